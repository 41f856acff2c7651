"""torch.hub, from folders with a hubconf.py: the two shapes of output that are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.teachers import load_teacher

HUBCONF = """
import torch
from torch import nn

dependencies = ["torch"]


class Dino(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_size = 14
        self.proj = nn.Conv2d(3, 8, 14, stride=14)

    def forward_features(self, x):
        tokens = self.proj(x).flatten(2).mT
        return {"x_norm_clstoken": tokens.mean(1), "x_norm_patchtokens": tokens}


class Conditioner(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("norm_mean", torch.full((3, 1, 1), 0.25))
        self.register_buffer("norm_std", torch.full((3, 1, 1), 0.5))

    def forward(self, x):
        return (x - self.norm_mean) / self.norm_std


class Radio(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_size = 16
        self.preferred_resolution = (64, 64)
        self.input_conditioner = Conditioner()
        self.proj = nn.Conv2d(3, 8, 16, stride=16)

    def make_preprocessor_external(self):
        conditioner, self.input_conditioner = self.input_conditioner, nn.Identity()
        return conditioner

    def forward(self, x):
        tokens = self.proj(self.input_conditioner(x)).flatten(2).mT
        return tokens.amax(1), tokens


def dino(pretrained=True):
    assert pretrained is False
    return Dino()


def radio_model(version):
    assert version == "tiny"
    return Radio()


def neither(pretrained=True):
    return nn.Linear(2, 2)
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that torch.hub loads from."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo/hubconf.py").write_text(HUBCONF)
    return tmp_path / "repo"


def spec(repository: Path, entry: str, **options: object) -> TeacherConfig:
    """A twin from that folder."""
    return TeacherConfig.model_validate(
        {"name": "t", "library": "torch_hub", "model": f"{repository}:{entry}", "pretrained": False, "options": options, "seed": 5}
    )


def test_a_dino_of_facebookresearch(repository: Path) -> None:
    teacher = load_teacher(spec(repository, "dino"), "cpu", torch.float32)
    assert (teacher.facts.patch_size, teacher.facts.resolution, teacher.facts.spatial_channels) == (14, 224, 8)
    features = teacher(torch.rand(2, 3, 28, 42))
    assert features.grid == (2, 3)
    torch.testing.assert_close(features.summary_BC, features.spatial_BTC.mean(1))
    torch.testing.assert_close(teacher.mean_C, torch.tensor([0.485, 0.456, 0.406]))


def test_a_radio_of_nvlabs_is_normalised_outside(repository: Path) -> None:
    teacher = load_teacher(spec(repository, "radio_model", version="tiny"), "cpu", torch.float32)
    assert teacher.facts.resolution == 64
    torch.testing.assert_close(teacher.mean_C, torch.full((3,), 0.25))
    images = torch.rand(2, 3, 64, 64)
    expected = teacher.tower.module.proj((images - 0.25) / 0.5).flatten(2).mT
    torch.testing.assert_close(teacher(images).spatial_BTC, expected)


def test_other_models_are_refused(repository: Path) -> None:
    with pytest.raises(ValueError, match="expected RADIO .* or a DINO .*, got neither"):
        load_teacher(spec(repository, "neither"), "cpu", torch.float32)
