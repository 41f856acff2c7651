"""Every preset, shrunken, is written in at least one of the formats that users load, and export goes on where one cannot be."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModel

from megatron_hybrid.config.load import read_tree
from tests.vision_agglom.export.conftest import HEADS, make_radio
from vision_agglom.commands.export import write_formats
from vision_agglom.config import load
from vision_agglom.config.student import StudentConfig
from vision_agglom.heads import HeadShape
from vision_agglom.plain.radio import PlainRadio
from vision_agglom.trained import plain_shape

SHRUNKEN = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 48}
LOADED_BY_USERS = ("hub", "transformers")


def shrunken(preset: str, **changes: Any) -> PlainRadio:
    """What a preset's student is, in all but its size, with seeded weights."""
    options = read_tree(Path(load.__file__).with_name("presets") / f"{preset}.yaml") | SHRUNKEN | changes
    options["max_image_size"] = 4 * options["patch_size"]
    heads = [HeadShape(head.name, head.summary_channels, head.spatial_channels, head.hidden_size, head.num_inner) for head in HEADS]
    return make_radio(**asdict(plain_shape(StudentConfig(**options), heads)))


def export(radio: PlainRadio, output: Path) -> list[str]:
    trained: Any = SimpleNamespace(radio=radio)
    return write_formats(trained, output, 2 * radio.shape.patch_size, LOADED_BY_USERS)


@pytest.mark.parametrize("preset", load.student_preset_names())
def test_every_preset_is_exported_to_a_format_that_users_load(preset: str, tmp_path: Path) -> None:
    radio = shrunken(preset)
    written = export(radio, tmp_path)
    assert "transformers" in written
    side = 2 * radio.shape.patch_size
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = AutoModel.from_pretrained(tmp_path / "transformers").eval()(images)
        torch.testing.assert_close(output.features, radio(images)[1], rtol=1e-5, atol=1e-5)
    assert (tmp_path / "radio.pth").exists() == ("hub" in written) == (radio.shape.mlp == "gelu")


def test_a_format_that_cannot_be_the_student_is_named_and_the_others_are_written(tmp_path: Path, capsys) -> None:
    assert export(shrunken("vit-b-16", final_norm=True), tmp_path) == ["hub"]
    assert "transformers is not written: transformers' RadioModel has no norm behind the last block" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["radio.pth"]


def test_none_may_be_left(tmp_path: Path, capsys) -> None:
    assert export(shrunken("vit-g-14", final_norm=True), tmp_path) == []
    assert "hub is not written: NVlabs' loader builds SwiGLU students as another architecture" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
