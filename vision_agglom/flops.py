"""Size and cost of a student. FLOPs are counted as in megatron_hybrid.layout.flops: two per multiply-add of every product, three passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vision_agglom.config.student import StudentConfig

if TYPE_CHECKING:
    from vision_agglom.heads import HeadShape


def backbone_parameters(student: StudentConfig, num_prefix_tokens: int) -> int:
    """Parameters of embedding, blocks and final norm."""
    width, inner = student.hidden_size, student.ffn_hidden_size
    outer = inner * (2 if student.mlp == "swiglu" else 1)
    attention = 3 * width * width + 3 * width + width * width + width
    mlp = width * outer + outer + inner * width + width
    per_block = attention + mlp + 4 * width
    if student.layer_scale is not None:
        per_block += 2 * width
    if student.spectral_reparam:
        per_block += 3 + 1 + (2 if student.mlp == "swiglu" else 1) + 1
    embedding = width * (3 * student.patch_size**2 + student.table_side**2 + num_prefix_tokens)
    return embedding + student.num_layers * per_block + (2 * width if student.final_norm else 0)


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
