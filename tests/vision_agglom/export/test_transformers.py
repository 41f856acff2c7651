"""transformers' RadioModel: the same function to 1e-5, also after saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, CLIPImageProcessorPil

from tests.vision_agglom.export.conftest import make_images, make_radio
from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.export.transformers import to_transformers, write_transformers
from vision_agglom.teachers import load_teacher

SHAPES: dict[str, dict[str, Any]] = {
    "gelu": {},
    "swiglu": {"mlp": "swiglu"},
    "layer scale": {"layer_scale": True},
    "no qkv bias": {"qkv_bias": False},
    "other numbers": {"mlp_hidden_size": 53, "num_registers": 0, "norm_eps": 1e-4, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_function(shape: str, tmp_path: Path) -> None:
    radio, images = make_radio(**SHAPES[shape]), make_images()
    write_transformers(radio, tmp_path, image_side=48)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded).__name__ == "RadioModel"
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        summary, spatial = radio(images)
        output = loaded.eval()(images)
    torch.testing.assert_close(output.summary, summary, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.features, spatial, rtol=1e-5, atol=1e-5)


def test_a_wrong_arrangement_would_be_seen() -> None:
    radio, images = make_radio(), make_images()
    model = to_transformers(radio, image_side=48)
    weight = model.encoder.layer[1].attention.q_proj.weight
    with torch.no_grad():
        weight.copy_(weight.unflatten(0, (4, 8)).transpose(0, 1).flatten(0, 1))
        assert (model(images).features - radio(images)[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_norm": True}, "no norm behind the last block"),
        ({"patch_bias": True}, "no bias in the patch embedding"),
        ({"mlp": "swiglu", "mlp_hidden_size": 50}, "multiples of 8, this student's is 50"),
    ],
)
def test_what_radio_model_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_transformers(make_radio(**changes), image_side=48)


def test_the_folder_is_a_teacher_too_and_is_normalised_once(tmp_path: Path) -> None:
    radio, images = make_radio(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)), make_images()
    write_transformers(radio, tmp_path, image_side=48)
    teacher = load_teacher(TeacherConfig(name="t", library="transformers", model=str(tmp_path), resolution=48), "cpu", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images).spatial_BTC, radio(images)[1], rtol=1e-5, atol=1e-5)
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    photograph = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    pixels = processor(photograph, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels[0], torch.from_numpy(photograph).permute(2, 0, 1) / 255)
