"""The plain ViT, which exports and checkpoints are compared with."""

from __future__ import annotations

import pytest
import torch

from vision_agglom.plain.radio import PlainHeadShape, PlainRadio
from vision_agglom.plain.vit import PlainViT, PlainViTShape

SHAPE = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "patch_size": 4, "num_cls_tokens": 2, "num_registers": 1, "table_side": 8}


def model(**changes) -> PlainViT:
    torch.manual_seed(0)
    return PlainViT(PlainViTShape(**{**SHAPE, **changes})).eval()


@torch.no_grad()
def test_outputs_of_any_side() -> None:
    vit = model(summary_idxs=(0, 1))
    for height, width in ((32, 32), (16, 24)):
        summary, patches = vit(torch.rand(3, 3, height, width))
        assert summary.shape == (3, 32) and patches.shape == (3, height * width // 16, 16)


@torch.no_grad()
def test_positions_are_the_table_at_its_own_side_and_its_top_left_where_the_image_is_narrow() -> None:
    generator = model().base_model.patch_generator
    table = generator.pos_embed[0].view(8, 8, 16)
    assert torch.equal(generator.positions((8, 8))[0], table.flatten(0, 1))
    assert torch.equal(generator.positions((8, 3))[0], table[:, :3].flatten(0, 1))


@torch.no_grad()
def test_patches_that_change_places_change_places() -> None:
    """Without positions a ViT does not know where a patch lies: registers and class tokens say the same of any order."""
    vit = model()
    vit.base_model.patch_generator.pos_embed.zero_()
    image = torch.rand(1, 3, 8, 8)
    swapped = image.flip(3).unflatten(3, (2, 4)).flip(4).flatten(3)
    (summary, patches), (other_summary, other_patches) = vit(image), vit(swapped)
    torch.testing.assert_close(other_summary, summary)
    torch.testing.assert_close(other_patches[:, [1, 0, 3, 2]], patches)


@pytest.mark.parametrize("changes", [{"mlp": "swiglu"}, {"layer_scale": True}, {"final_norm": True}])
@torch.no_grad()
def test_each_option_does_something(changes) -> None:
    image = torch.rand(1, 3, 16, 16)
    vit = model(**changes)
    if "layer_scale" in changes:
        for block in vit.base_model.blocks:
            block.ls1.gamma.fill_(0.5)
    assert not torch.allclose(vit(image)[1], model()(image)[1])


@torch.no_grad()
def test_a_summary_head_reads_its_own_class_token() -> None:
    heads = (PlainHeadShape("clip", 0, 5, 6, 8), PlainHeadShape("dino", 1, 7, 4, 8, num_inner=1))
    torch.manual_seed(0)
    radio = PlainRadio(PlainViTShape(**SHAPE), heads).eval()
    image = torch.rand(2, 3, 16, 16)
    before = radio.features(image)
    assert before.adaptors["clip"].summary_BC.shape == (2, 5) and before.adaptors["dino"].spatial_BTC.shape == (2, 16, 4)
    tokens = radio.base_model((image - radio.input_conditioner.norm_mean) / radio.input_conditioner.norm_std)
    for head in heads:
        torch.testing.assert_close(before.adaptors[head.name].summary_BC, radio._heads[head.name](tokens[:, head.token]))
