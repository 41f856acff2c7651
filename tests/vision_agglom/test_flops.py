"""Sizes and costs by formula are those of the modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vision_agglom.small import STUDENT, small_vision_run
from vision_agglom.config.student import StudentConfig
from vision_agglom.flops import backbone_parameters, training_flops_per_image
from vision_agglom.heads import HeadShape
from vision_agglom.plain.vit import PlainViT, PlainViTShape


@pytest.mark.parametrize("changes", [{}, {"mlp": "swiglu"}, {"layer_scale": 0.1, "final_norm": True}])
def test_parameters_are_those_of_the_plain_vit(changes) -> None:
    student = StudentConfig(**{**STUDENT, **changes})
    shape = PlainViTShape(
        hidden_size=student.hidden_size,
        num_layers=student.num_layers,
        num_heads=student.num_attention_heads,
        patch_size=student.patch_size,
        mlp_hidden_size=student.ffn_hidden_size,
        mlp=student.mlp,
        num_cls_tokens=3,
        num_registers=1,
        table_side=student.table_side,
        final_norm=student.final_norm,
        layer_scale=student.layer_scale is not None,
    )
    assert backbone_parameters(student, 4) == sum(parameter.numel() for parameter in PlainViT(shape).parameters())


def test_products_by_hand(tmp_path: Path) -> None:
    student = small_vision_run(tmp_path).student
    tokens, width, inner = 20, 32, 48
    block = tokens * (4 * width * width + 2 * width * inner) + 2 * tokens**2 * width
    embedding = tokens * width * 3 * 64
    assert training_flops_per_image(student, tokens, ()) == 6 * (4 * block + embedding)
    head = HeadShape("clip", 12, 20, 40, 1)
    in_head = tokens * (width * 40 + 40 * 40 + 40 * 20) + width * 40 + 40 * 40 + 40 * 12
    assert training_flops_per_image(student, tokens, [head]) == 6 * (4 * block + embedding + in_head)
