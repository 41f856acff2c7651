"""What teachers, data and training hand one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class TeacherFeatures:
    """What a teacher says about a batch of images."""

    summary_BC: Tensor | None
    """[B, summary channels], fp32 or bf16; None where the teacher has no summary."""
    spatial_BTC: Tensor
    """[B, rows x columns, spatial channels], row-major."""
    grid: tuple[int, int]
    """(rows, columns)."""


@dataclass(frozen=True)
class TeacherFacts:
    """What is known of a teacher before it runs."""

    name: str
    patch_size: int
    resolution: int
    """Side in pixels that it was made for."""
    fixed_resolution: bool
    """Whether it takes no other side."""
    summary_channels: int | None
    spatial_channels: int


class Teacher(Protocol):
    """A frozen model that describes images."""

    facts: TeacherFacts

    def __call__(self, images_BCHW: Tensor) -> TeacherFeatures:
        """Describe RGB images in [0, 1], float32; the teacher normalises, and resizes only if it was asked to."""


@dataclass(frozen=True)
class ImageBatch:
    """One micro-batch of images."""

    images_BCHW: Tensor
    """float32 in [0, 1], RGB, height = width = resolution."""
    sample_indices_B: Tensor
    """int64 on the host, the global index of each sample."""
    resolution: int
