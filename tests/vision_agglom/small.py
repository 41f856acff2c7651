"""A small distillation: synthetic images, random teachers of different patch, resolution, width and scale, and a run over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vision_agglom.config.schema import VisionConfig
from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.contract import ImageBatch, TeacherFacts, TeacherFeatures

STUDENT = {
    "patch_size": 8,
    "hidden_size": 32,
    "num_layers": 4,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "max_image_size": 64,
    "register_multiple": 4,
}

FACTS = {
    "clip": TeacherFacts("clip", patch_size=7, resolution=28, fixed_resolution=False, summary_channels=12, spatial_channels=20),
    "dino": TeacherFacts("dino", patch_size=4, resolution=32, fixed_resolution=False, summary_channels=16, spatial_channels=24),
    "sam": TeacherFacts("sam", patch_size=8, resolution=64, fixed_resolution=True, summary_channels=None, spatial_channels=16),
}
SCALES = {"clip": 0.03, "dino": 1.0, "sam": 20.0}


class RandomTeacher:
    """Patches through a fixed random two-layer map, with neighbours mixed in, so that features hang together as a teacher's do."""

    def __init__(self, spec: TeacherConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.facts, self.dtype = FACTS[spec.name], dtype
        generator = torch.Generator().manual_seed(len(spec.name))
        self.scale = SCALES[spec.name]
        self.inner = torch.randn(3 * self.facts.patch_size**2, 64, generator=generator) / self.facts.patch_size
        self.outer = torch.randn(64, self.facts.spatial_channels, generator=generator) * torch.linspace(
            0.2, 1.0, self.facts.spatial_channels
        )
        self.summary = torch.randn(64, self.facts.summary_channels or 1, generator=generator)

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> TeacherFeatures:
        patch = self.facts.patch_size
        if self.facts.fixed_resolution:
            assert images_BCHW.shape[2:] == (self.facts.resolution,) * 2, images_BCHW.shape
        patches = torch.nn.functional.unfold(images_BCHW, patch, stride=patch).transpose(1, 2)
        grid = (images_BCHW.shape[2] // patch, images_BCHW.shape[3] // patch)
        inner = torch.tanh((patches - 0.5) @ self.inner)
        inner = inner + 0.5 * inner.mean(1, keepdim=True)
        summary = None if self.facts.summary_channels is None else (self.scale * inner.mean(1) @ self.summary).to(self.dtype)
        return TeacherFeatures(summary, (self.scale * (inner @ self.outer + 0.3)).to(self.dtype), grid)


class SyntheticStream:
    """Smooth random images by global index; ``ImageStream``'s arguments and order."""

    def __init__(self, config: Any, *, resolution: Any, data_rank: int, data_size: int, micro_batch: int, first_sample: int, device: Any):
        self.resolution, self.data_rank, self.data_size, self.micro_batch = resolution, data_rank, data_size, micro_batch
        self.position, self.device = first_sample, device

    def __iter__(self) -> Iterator[ImageBatch]:
        return self

    def __next__(self) -> ImageBatch:
        side = self.resolution(self.position) if callable(self.resolution) else self.resolution
        first = self.position + self.data_rank * self.micro_batch
        indices = np.arange(first, first + self.micro_batch)
        self.position += self.data_size * self.micro_batch
        images = torch.stack([synthetic_image(int(index), side) for index in indices])
        return ImageBatch(images.to(self.device), torch.from_numpy(indices).to(self.device), side)

    def close(self) -> None:
        """Nothing is open."""

    def fingerprint(self) -> dict[str, Any]:
        """Nothing is read."""
        return {"synthetic": True}


def synthetic_image(index: int, side: int) -> Tensor:
    """Waves and a square, float32 [3, side, side] in [0, 1]."""
    generator = np.random.default_rng(index % 2**32)
    y, x = np.mgrid[0:side, 0:side] / side
    waves = [np.sin(2 * np.pi * (generator.uniform(1, 5) * x + generator.uniform(1, 5) * y + generator.random())) for _ in range(3)]
    image = 0.5 + 0.3 * np.stack(waves)
    top, left = generator.uniform(0, 0.6, 2)
    inside = (y > top) & (y < top + 0.3) & (x > left) & (x < left + 0.3)
    return torch.from_numpy(np.where(inside, generator.random((3, 1, 1)), image)).float()


def small_vision_run(folder: Path, **sections: Any) -> VisionConfig:
    """Four steps of two partitions (8 images at 32 pixels for all teachers, 4 at 48 for two); sections override single options."""
    options: dict[str, Any] = {
        "run_dir": folder / "run",
        "student": dict(STUDENT),
        "teachers": [
            {"name": "clip", "library": "checkpoint", "model": "x", "pretrained": False, "summary_loss": "angle"},
            {"name": "dino", "library": "checkpoint", "model": "x", "pretrained": False, "view": "own", "spatial_loss": "cosine_smooth_l1"},
            {"name": "sam", "library": "checkpoint", "model": "x", "pretrained": False, "view": "mosaic", "summary_loss": "none"},
        ],
        "images": {"sources": {"synthetic": {"path": "none"}}, "num_workers": 0},
        "stages": [
            {
                "steps": 4,
                "decay": "constant",
                "partitions": [
                    {"resolutions": [32], "batch_size": 8, "micro_batch_size": 2},
                    {"resolutions": [48, 40], "batch_size": 4, "micro_batch_size": 1, "teachers": ["clip", "dino"], "weight": 2.0},
                ],
            }
        ],
        "statistics": {"steps": 3, "refresh_steps": 2},
        "optimizer": {"lr": 1e-3},
        "train": {"precision": "fp32", "teacher_precision": "fp32"},
        "runtime": {"timeout_s": 60, "threads_per_rank": 1},
    }
    for name, section in sections.items():
        options[name] = {**options.get(name, {}), **section} if isinstance(section, dict) else section
    return VisionConfig(**options)
