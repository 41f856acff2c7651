"""NVlabs' checkpoint: what its loader reads, from the published list of fields, and nothing that it would trip over.

The loader itself is under a licence that keeps it out of this project, so these tests stand in its place; our own reader of such files is
not the code that writes them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vision_agglom.export.conftest import HEADS, make_images, make_radio
from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.export.hub import hub_arguments, ratio_for, write_hub_checkpoint
from vision_agglom.plain.radio import PlainHead, PlainHeadShape
from vision_agglom.teachers import load_teacher

READ_WITHOUT_DEFAULT = (
    "spectral_reparam model in_chans input_size pretrained num_classes drop drop_path drop_block gp bn_momentum bn_eps torchscript "
    "initial_checkpoint model_kwargs cpe_max_size teachers cls_token_per_teacher mlp_version"
).split()


def load(path: Path) -> dict[str, Any]:
    """The file, opened without running anything in it."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The small student's file."""
    write_hub_checkpoint(make_radio(), tmp_path / "radio.pth", input_side=48)
    return tmp_path / "radio.pth"


def test_every_field_that_is_read_is_there_and_plain(written: Path) -> None:
    args = load(written)["args"]
    assert not [name for name in READ_WITHOUT_DEFAULT if not hasattr(args, name)]

    def is_plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and is_plain(each) for key, each in value.items())
        if isinstance(value, list | tuple):
            return all(map(is_plain, value))
        return value is None or type(value) in (bool, int, float, str)

    assert all(is_plain(value) for value in vars(args).values())
    assert args.input_size == (3, 48, 48) and args.cpe_max_size == 64 and args.cpe_num_registers == 2


def test_the_tensors_are_those_that_the_loader_builds_and_no_others(written: Path) -> None:
    blocks = "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2".split()
    expected = {f"base_model.blocks.{n}.{name}.{kind}" for n in range(2) for name in blocks for kind in ("weight", "bias")}
    expected |= {f"base_model.patch_generator.{name}" for name in ("embedder.weight", "pos_embed", "cls_token.token")}
    expected |= {f"input_conditioner.norm_{name}" for name in ("mean", "std")}
    parts = {"clip": ["fc1", "blocks.0.0", "blocks.0.2", "final.0", "final.2"], "dino": ["fc1", "final.0", "final.2"]}
    parts["sam"] = parts["dino"]
    for group, names in (("_heads", ["clip", "dino"]), ("_feature_projections", ["clip", "sam", "dino"])):
        expected |= {f"{group}.{name}.{part}.{kind}" for name in names for part in parts[name] for kind in ("weight", "bias")}
    state = load(written)["state_dict"]
    assert set(state) == expected
    assert state["base_model.patch_generator.pos_embed"].shape == (1, 64, 32)
    assert state["base_model.patch_generator.cls_token.token"].shape == (5, 32)
    assert state["input_conditioner.norm_mean"].shape == (3, 1, 1)


def test_teachers_are_listed_once_in_the_order_of_their_tokens(written: Path) -> None:
    teachers = load(written)["args"].teachers
    assert [teacher["name"] for teacher in teachers] == ["clip", "sam", "dino"]
    assert [teacher["use_summary"] for teacher in teachers] == [True, False, True]
    assert [teacher["token_slot"] for teacher in teachers] == [0, 1, 2]
    assert not {teacher["type"] for teacher in teachers} & {"open_clip", "siglip2"}, "those would download text towers"


def test_read_back_as_a_teacher_it_says_the_same(written: Path) -> None:
    spec = TeacherConfig(name="t", library="checkpoint", model=str(written))
    teacher = load_teacher(spec, "cpu", torch.float32)
    images = make_images()
    with torch.no_grad():
        summary, spatial = make_radio()(images)
    features = teacher(images)
    torch.testing.assert_close(features.summary_BC, summary, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.spatial_BTC, spatial, rtol=1e-5, atol=1e-5)


def test_heads_found_by_prefix_say_the_same(written: Path) -> None:
    """As the loader finds them: every key that begins with the group and the name."""
    state, images = load(written)["state_dict"], make_images()
    radio = make_radio()
    with torch.no_grad():
        summary, spatial = radio(images)
        expected = radio.features(images).adaptors
        for teacher in load(written)["args"].teachers:
            name = teacher["name"]
            for group, tokens, want in (
                ("_heads", summary.unflatten(1, (2, 32))[:, 0 if name == "clip" else 1], expected[name].summary_BC),
                ("_feature_projections", spatial, expected[name].spatial_BTC),
            ):
                prefix = f"{group}.{name}"
                found = {key[len(prefix) + 1 :]: tensor for key, tensor in state.items() if key.startswith(prefix)}
                if want is None:
                    assert not found
                    continue
                head = PlainHead(32, 40, found["final.2.bias"].shape[0], len([key for key in found if key.endswith(".2.weight")]) - 1)
                head.load_state_dict(found)
                torch.testing.assert_close(head(tokens), want)


@pytest.mark.parametrize(
    ("changes", "name", "options"),
    [
        ({"hidden_size": 768, "num_layers": 12, "num_heads": 12, "patch_size": 16}, "vit_base_patch16_224", {}),
        ({"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "patch_size": 14}, "vit_large_patch16_224", {"patch_size": 14}),
        ({"hidden_size": 1152, "num_layers": 27, "num_heads": 16, "patch_size": 16, "mlp_hidden_size": 4304}, "vit_so400m_patch16_224", {}),
    ],
)
def test_known_sizes_have_their_names(changes: dict[str, int], name: str, options: dict[str, Any]) -> None:
    class Described:
        """A shape without its weights."""

        shape = replace(make_radio().shape, **{"mlp_hidden_size": None, **changes})
        head_shapes = HEADS

    args = hub_arguments(Described(), 224)  # type: ignore[arg-type]
    assert (args.model, args.model_kwargs) == (name, options)


def test_other_sizes_are_a_tiny_one_changed(written: Path) -> None:
    args = load(written)["args"]
    assert args.model == "vit_tiny_patch16_224"
    assert args.model_kwargs == {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8, "mlp_ratio": 1.5}
    for hidden, width in ((4304, 1152), (48, 32), (1000, 768), (4320, 1152), (53, 31)):
        assert int(width * ratio_for(hidden, width)) == hidden


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp": "swiglu"}, "SwiGLU students as another architecture"),
        ({"norm_eps": 1e-5}, "builds norms with eps 1e-6"),
        ({"heads": (*HEADS[:2], PlainHeadShape("sam3", 2, None, 8, 8))}, "looked up by prefix, and 'sam' is one of 'sam3'"),
        ({"heads": (HEADS[0], replace(HEADS[0], token=1))}, "'clip' is one of 'clip'|looked up by prefix"),
        ({"heads": (replace(HEADS[0], token=1), replace(HEADS[1], token=0))}, "one class token per teacher, in the teachers' order"),
    ],
)
def test_what_the_loader_cannot_build_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_hub_checkpoint(make_radio(**changes), tmp_path / "x.pth", input_side=48)
    assert not list(tmp_path.iterdir())
