"""What a student takes from a ViT's file, what is passed over, and that nothing is dropped without a word."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vision_agglom.config.student import StudentConfig
from vision_agglom.plain.files import read_vit_file
from vision_agglom.plain.vit import PlainViT, PlainViTShape
from vision_agglom.students.pretrained import PretrainedWeights, arrange_for_student, start_tokens

SHAPE = {"hidden_size": 24, "num_layers": 2, "num_heads": 3, "patch_size": 8, "mlp_hidden_size": 32, "table_side": 4}
STUDENT = {"patch_size": 8, "hidden_size": 24, "num_layers": 2, "num_attention_heads": 3, "ffn_hidden_size": 32, "max_image_size": 32}


def radio_state(**shape: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return PlainViT(PlainViTShape(**{**SHAPE, **shape})).state_dict()


def timm_state(**shape: Any) -> dict[str, Tensor]:
    """A ViT as timm saves it, with a classifier."""
    state = radio_state(**shape)
    generator = "base_model.patch_generator."
    tokens = state[f"{generator}cls_token.token"]
    timm = {name.removeprefix("base_model."): tensor for name, tensor in state.items() if "blocks" in name or ".norm." in name}
    timm |= {
        "patch_embed.proj.weight": state[f"{generator}embedder.weight"].view(24, 3, 8, 8),
        "cls_token": tokens[None, :1],
        "pos_embed": state[f"{generator}pos_embed"],
        "head.weight": torch.zeros(10, 24),
    }
    return timm | ({"reg_token": tokens[None, 1:]} if len(tokens) > 1 else {})


def arranged(state: dict[str, Tensor], folder: Path, args: argparse.Namespace | None = None, **student: Any) -> PretrainedWeights:
    torch.save({"state_dict": state} | ({"args": args} if args else {}), folder / "vit.pth")
    config = StudentConfig(**{**STUDENT, "initialize_from": folder / "vit.pth", **student})
    return arrange_for_student(read_vit_file(folder / "vit.pth"), config)


@pytest.mark.parametrize(
    ("shape", "extra", "unread"),
    [
        ({"num_layers": 4}, [], "blocks.2.norm1.weight"),
        ({"layer_scale": True}, [], "blocks.0.ls1.gamma, blocks.0.ls2.gamma, blocks.1.ls1.gamma"),
        ({"final_norm": True}, [], "norm.weight, norm.bias"),
        ({}, ["blocks.0.attn.q_norm.weight"], "blocks.0.attn.q_norm.weight"),
        ({}, ["norm_pre.weight"], "norm_pre.weight"),
        ({}, ["dist_token"], "dist_token"),
    ],
)
def test_a_tensor_without_a_place_is_refused_by_name(shape: dict[str, Any], extra: list[str], unread: str, tmp_path: Path) -> None:
    state = timm_state(**shape) | {name: torch.ones(24) for name in extra}
    with pytest.raises(ValueError, match=rf"\(num_layers=2, .*\) has no place for {unread}.*student.initialize_skip"):
        arranged(state, tmp_path)


def test_what_is_passed_over_is_told(tmp_path: Path) -> None:
    pretrained = arranged(timm_state(), tmp_path)
    assert pretrained.passed_over == ("head.weight",)
    normalised = radio_state() | {
        name: torch.ones(2) for name in ("_feature_normalizer.mean", "base_model.patch_generator.video_embedder.x")
    }
    assert len(arranged(normalised, tmp_path).passed_over) == 2
    pretrained = arranged(timm_state(final_norm=True), tmp_path, initialize_skip=["norm."])
    assert sorted(pretrained.passed_over) == ["head.weight", "norm.bias", "norm.weight"]
    with pytest.raises(ValueError, match="initialize_skip=.* is not read without initialize_from"):
        StudentConfig(**STUDENT, initialize_skip=["norm."])


def test_everything_that_has_a_place_is_taken(tmp_path: Path) -> None:
    state = radio_state(layer_scale=True, final_norm=True, num_registers=2)
    pretrained = arranged(state, tmp_path, layer_scale=1.0, final_norm=True)
    assert pretrained.passed_over == () and len(pretrained.tokens_SD) == 3
    # Two blocks of norms, linears and their biases (12) and LayerScale (2); patches, positions, the last norm.
    assert len(pretrained.tensors) == 2 * 14 + 4


def test_dinov2s_own_names_are_read(tmp_path: Path) -> None:
    """As in RADIO's g: LayerScale's grandma, SwiGLU's w12 and w3."""
    state = radio_state(layer_scale=True, mlp="swiglu")
    state = {name.replace("gamma", "grandma"): tensor for name, tensor in state.items()}
    pretrained = arranged(state, tmp_path, layer_scale=1.0, mlp="swiglu")
    assert {"blocks.1.mlp.linear_fc2.layer_scale", "blocks.1.mlp.linear_fc1.weight"} <= set(pretrained.tensors)


def test_the_averaged_weights_of_a_checkpoint_are_preferred(tmp_path: Path) -> None:
    averaged = {name: tensor + 1 for name, tensor in radio_state().items() if not name.startswith("input")}
    torch.save({"state_dict": radio_state(), "state_dict_ema": averaged}, tmp_path / "vit.pth")
    key = "base_model.patch_generator.embedder.weight"
    torch.testing.assert_close(read_vit_file(tmp_path / "vit.pth").state[key], averaged[key])


def test_safetensors_are_read(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(radio_state(), tmp_path / "vit.safetensors")
    assert read_vit_file(tmp_path / "vit.safetensors").state.keys() == radio_state().keys()


def test_another_normalisation_of_the_images_is_refused(tmp_path: Path) -> None:
    state = radio_state(mean=(0.5, 0.5, 0.25))
    with pytest.raises(ValueError, match=r"set student.mean=\[0.5, 0.5, 0.25\]"):
        arranged(state, tmp_path)
    arranged(state, tmp_path, mean=(0.5, 0.5, 0.25))


@pytest.mark.parametrize(
    ("args", "num_cls_tokens"),
    [
        (None, None),
        (argparse.Namespace(teachers=[{"name": "clip"}, {"name": "dino"}, {"name": "clip"}]), 2),
        (argparse.Namespace(teachers=[{"name": "clip"}, {"name": "dino"}], cls_token_per_teacher=False), 1),
    ],
)
def test_a_radio_file_says_which_tokens_are_class_tokens(args: argparse.Namespace | None, num_cls_tokens: int, tmp_path: Path) -> None:
    pretrained = arranged(radio_state(num_cls_tokens=2, num_registers=2), tmp_path, args)
    assert len(pretrained.tokens_SD) == 4 and pretrained.num_cls_tokens == num_cls_tokens


DRAWN = torch.arange(5.0)[:, None].expand(5, 2) / 100
"""Three class tokens and two registers."""


@pytest.mark.parametrize(
    ("given", "num_class_tokens", "expected"),
    [
        # RADIO's three class tokens and a register: as they are, the second register as drawn.
        ([1, 2, 3, 4], 3, [1, 2, 3, 4, 0.04]),
        # timm's one: the start of all three, each with its own noise; its registers.
        ([1, 8, 9], 1, [1.0, 1.01, 1.02, 8, 9]),
        # A bare state dict of exactly as many tokens.
        ([1, 2, 3, 4, 5], None, [1, 2, 3, 4, 5]),
        ([1], None, [1.0, 1.01, 1.02, 0.03, 0.04]),
        # No class token: registers alone.
        ([8, 9], 0, [0.0, 0.01, 0.02, 8, 9]),
    ],
)
def test_tokens_are_taken_over(given: list[float], num_class_tokens: int | None, expected: list[float]) -> None:
    tokens = start_tokens(DRAWN, torch.tensor(given)[:, None].expand(-1, 2).float(), 3, num_class_tokens)
    torch.testing.assert_close(tokens[:, 0], torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("num_given", "num_class_tokens", "finding"),
    [
        (4, 4, "it has 4 class tokens, the student 3, one per teacher; begin with new ones by student.initialize_skip"),
        (6, 3, "it has 3 registers, the student 2; raise student.num_registers, or begin"),
        (4, None, "does not say which of its 4 tokens before the patches are class tokens, and the student has 5"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(num_given: int, num_class_tokens: int | None, finding: str) -> None:
    with pytest.raises(ValueError, match=finding):
        start_tokens(DRAWN, torch.zeros(num_given, 2), 3, num_class_tokens)
