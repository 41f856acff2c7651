"""A small student with seeded weights that are nowhere zero."""

from __future__ import annotations

from typing import Any

import torch

from vision_agglom.plain.radio import PlainHeadShape, PlainRadio
from vision_agglom.plain.vit import PlainViTShape
from vision_agglom.teachers.tower import build_seeded

HEADS = (
    PlainHeadShape("clip", 0, 12, 20, 40, num_inner=1),
    PlainHeadShape("sam", 1, None, 16, 40),
    PlainHeadShape("dino", 2, 16, 24, 40),
)


def make_radio(heads: tuple[PlainHeadShape, ...] = HEADS, **changes: Any) -> PlainRadio:
    """Three teachers, the second without a summary."""
    options: dict[str, Any] = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "patch_size": 8,
        "mlp_hidden_size": 48,
        "num_cls_tokens": len(heads),
        "num_registers": 2,
        "summary_idxs": tuple(head.token for head in heads if head.summary_channels is not None),
        "table_side": 8,
    }
    shape = PlainViTShape(**{**options, **changes})
    radio = build_seeded(0, lambda: PlainRadio(shape, heads)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in radio.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return radio


def make_images() -> torch.Tensor:
    """Not square, and of another side than the position table."""
    return torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(1))
