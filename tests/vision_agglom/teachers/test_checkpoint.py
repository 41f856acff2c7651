"""Plain checkpoints: NVlabs' and timm's names, read safely."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import pytest
import torch

from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.plain.vit import PlainViT, PlainViTShape
from vision_agglom.teachers import load_teacher
from vision_agglom.teachers.frozen import FrozenTeacher

SHAPE = PlainViTShape(hidden_size=24, num_layers=2, num_heads=3, num_cls_tokens=3, num_registers=2, summary_idxs=(0, 2), table_side=8)
TEACHERS = [{"name": "clip"}, {"name": "sam", "use_summary": False}, {"name": "dino"}]


def plain(shape: PlainViTShape = SHAPE) -> PlainViT:
    """With seeded weights."""
    torch.manual_seed(0)
    return PlainViT(shape).eval()


def load(path: Path, **options: object) -> FrozenTeacher:
    """As a teacher on the CPU."""
    spec = TeacherConfig.model_validate({"name": "t", "library": "checkpoint", "model": str(path), "options": options})
    return load_teacher(spec, "cpu", torch.float32)


def test_a_radio_file_says_what_it_is(tmp_path: Path) -> None:
    model = plain()
    args = argparse.Namespace(model="vit_base_patch16_224", model_kwargs={"num_heads": 3}, teachers=TEACHERS, cls_token_per_teacher=True)
    others = ("_heads.0.fc1.weight", "_intermediate_feature_normalizer.alphas", "base_model.patch_generator.video_embedder.weight")
    others += ("head_dist.weight", "attn_pool.latent", "mask_token")
    torch.save({"state_dict": model.state_dict() | {name: torch.ones(2) for name in others}, "args": args}, tmp_path / "radio.pth")
    teacher = load(tmp_path / "radio.pth")
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        summary, spatial = model(images)
    features = teacher(images)
    torch.testing.assert_close(features.summary_BC, summary)
    torch.testing.assert_close(features.spatial_BTC, spatial)
    assert teacher.facts.summary_channels == 48 and not teacher.facts.fixed_resolution


def test_heads_come_from_options_arguments_or_the_models_name(tmp_path: Path) -> None:
    model = plain()
    for args in (argparse.Namespace(model="vit_tiny_patch16_224"), argparse.Namespace(model_kwargs={"num_heads": 3})):
        torch.save({"state_dict": model.state_dict(), "args": args}, tmp_path / "x.pth")
        load(tmp_path / "x.pth")
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    load(tmp_path / "bare.pth", num_heads=3)
    with pytest.raises(ValueError, match="does not tell its number of attention heads; give options.num_heads"):
        load(tmp_path / "bare.pth")


@pytest.mark.parametrize("with_registers", [False, True])
def test_a_timm_file_is_the_same_model_under_other_names(tmp_path: Path, with_registers: bool) -> None:
    shape = PlainViTShape(
        24, 2, 3, num_registers=4 if with_registers else 0, table_side=4, final_norm=True, patch_bias=True, layer_scale=True
    )
    model = plain(shape)
    state = model.state_dict()
    generator = "base_model.patch_generator"
    tokens = state[f"{generator}.cls_token.token"]
    timm = {name.removeprefix("base_model."): value for name, value in state.items() if "blocks" in name or ".norm." in name}
    timm |= {
        "patch_embed.proj.weight": state[f"{generator}.embedder.weight"].view(24, 3, 16, 16),
        "patch_embed.proj.bias": state[f"{generator}.embedder.bias"],
        "cls_token": tokens[None, :1] - 0.5 * (not with_registers),
        "pos_embed": state[f"{generator}.pos_embed"],
    }
    if with_registers:
        timm["reg_token"] = tokens[None, 1:]
    else:
        timm["pos_embed"] = torch.cat([torch.full((1, 1, 24), 0.5), timm["pos_embed"]], 1)
    torch.save(timm, tmp_path / "timm.pth")
    teacher = load(tmp_path / "timm.pth", num_heads=3)
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        summary, spatial = model.describe((images - mean) / std)
    torch.testing.assert_close(teacher(images).summary_BC, summary)
    torch.testing.assert_close(teacher(images).spatial_BTC, spatial)
    assert teacher.facts.fixed_resolution and teacher.facts.resolution == 64


def test_a_timm_file_with_registers_alone_has_no_summary_to_give(tmp_path: Path) -> None:
    tokens = {"reg_token": torch.zeros(1, 4, 24), "pos_embed": torch.zeros(1, 16, 24)}
    torch.save({"patch_embed.proj.weight": torch.zeros(24, 3, 16, 16), **tokens}, tmp_path / "gap.pth")
    with pytest.raises(ValueError, match="expected a timm ViT with a class token"):
        load(tmp_path / "gap.pth", num_heads=3)


class Boom:
    """Would run on loading."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "args": Boom()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="not a checkpoint of tensors and plain types"):
        load(tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="expected a dictionary|not a checkpoint"):
        load(tmp_path / "y.pth")
    assert "ran" not in capsys.readouterr().out


def test_what_is_missing_or_left_over_is_named(tmp_path: Path) -> None:
    state = plain().state_dict()
    del state["base_model.blocks.1.mlp.fc2.bias"]
    torch.save(
        {"state_dict": state | {"base_model.surprise": torch.ones(1)}, "args": argparse.Namespace(model="vit_tiny_x")}, tmp_path / "x.pth"
    )
    with pytest.raises(ValueError, match=r"(?s)Missing key.*blocks.1.mlp.fc2.bias.*Unexpected key.*base_model.surprise"):
        load(tmp_path / "x.pth")
    torch.save(plain().state_dict() | {"_feature_normalizer.tx": torch.eye(24)}, tmp_path / "mapped.pth")
    with pytest.raises(ValueError, match="maps its features once more"):
        load(tmp_path / "mapped.pth", num_heads=3)
    torch.save({"layer.weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected parameters of NVlabs' RADIO .* or of a timm ViT"):
        load(tmp_path / "other.pth", num_heads=3)
