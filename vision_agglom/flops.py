"""Training FLOPs of a student, counted as in megatron_hybrid.layout.flops: two per multiply-add of every matrix product, three passes."""

from __future__ import annotations

from collections.abc import Sequence

from vision_agglom.config.student import StudentConfig
from vision_agglom.heads import HeadShape


def training_flops_per_image(student: StudentConfig, num_tokens: int, heads: Sequence[HeadShape]) -> float:
    """Forward and backward of one image of ``num_tokens`` tokens, class and register tokens included; global attention throughout.

    Norms, activations and the sampling of positions are not counted.
    """
    width, inner = student.hidden_size, student.ffn_hidden_size
    mlp = width * inner * (3 if student.mlp == "swiglu" else 2)
    per_token = student.num_layers * (4 * width * width + mlp) + width * 3 * student.patch_size**2
    attention = student.num_layers * 2 * num_tokens**2 * width
    in_heads = 0
    for head in heads:
        trunk = width * head.hidden_size + head.num_inner * head.hidden_size**2
        in_heads += num_tokens * (trunk + head.hidden_size * head.spatial_channels)
        if head.summary_channels is not None:
            in_heads += trunk + head.hidden_size * head.summary_channels
    return 3 * 2.0 * (num_tokens * per_token + attention + in_heads)
