"""Reconciling the student's grid of patches with a teacher's.

The rule. Student and teacher may see different windows of the same canvas. Both are compared on the coarser of the two grids, counted
in patches per canvas pixel; the finer one is resampled to it, bilinearly, at the centres of the coarser one's patches. A position counts
if its centre lies within the outermost patch centres of the resampled grid, or if both saw the same window, where every position counts
and the outermost values are repeated (torch's align_corners=False).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vision_agglom.resample import bilinear_matrix, sample_grid
from vision_agglom.transfer import send


@dataclass(frozen=True)
class View:
    """What a network saw: a square window of each image of a batch, and the grid of features it made of it."""

    grid: tuple[int, int]
    tops_B: Tensor
    """fp64 [B], in canvas pixels."""
    lefts_B: Tensor
    side: float
    """In canvas pixels."""

    @classmethod
    def whole(cls, grid: tuple[int, int], side: float, batch: int) -> View:
        """The whole canvas."""
        zeros = torch.zeros(batch, dtype=torch.float64)
        return cls(grid, zeros, zeros, side)

    def centres(self, axis: int) -> Tensor:
        """Canvas coordinates [B, N] of the patch centres along rows (0) or columns (1)."""
        count, starts_B = self.grid[axis], (self.tops_B, self.lefts_B)[axis]
        return starts_B[:, None] + (torch.arange(count, dtype=torch.float64) + 0.5) * (self.side / count)

    def locate(self, coordinates_BN: Tensor, axis: int) -> Tensor:
        """Canvas coordinates as real-valued patch numbers of this grid."""
        count, starts_B = self.grid[axis], (self.tops_B, self.lefts_B)[axis]
        return (coordinates_BN - starts_B[:, None]) * (count / self.side) - 0.5


@dataclass(frozen=True)
class Matched:
    """Student and teacher on one grid."""

    student_BTC: Tensor
    teacher_BTC: Tensor
    mask_BT: Tensor | None
    """fp32, 1 where a position counts; None where all do."""


def match_grids(student_BTC: Tensor, student: View, teacher_BTC: Tensor, teacher: View) -> Matched:
    """Bring both to the coarser grid by the rule above.

    Args:
        student_BTC: row-major features with as many channels as the teacher's, in any floating dtype.
        teacher_BTC: the targets.
    """
    same_window = (
        student.side == teacher.side and torch.equal(student.tops_B, teacher.tops_B) and torch.equal(student.lefts_B, teacher.lefts_B)
    )
    if same_window and student.grid == teacher.grid:
        return Matched(student_BTC, teacher_BTC, None)
    if student.side / student.grid[0] >= teacher.side / teacher.grid[0]:
        moved_BTC, mask_BT = _resample(teacher_BTC, teacher, student)
        matched = (student_BTC, moved_BTC)
    else:
        moved_BTC, mask_BT = _resample(student_BTC, student, teacher)
        matched = (moved_BTC, teacher_BTC)
    return Matched(*matched, None if same_window else mask_BT)


def _resample(features_BTC: Tensor, source: View, target: View) -> tuple[Tensor, Tensor]:
    """Features of one view at the patch centres of another, and where these lie inside."""
    matrices, inside = [], []
    for axis in (0, 1):
        positions_BN = source.locate(target.centres(axis), axis)
        matrices.append(send(bilinear_matrix(positions_BN, source.grid[axis]).to(features_BTC.dtype), features_BTC.device))
        inside.append(send((positions_BN > -1e-9) & (positions_BN < source.grid[axis] - 1 + 1e-9), features_BTC.device))
    moved_BTC = sample_grid(features_BTC.unflatten(1, source.grid), *matrices).flatten(1, 2)
    return moved_BTC, (inside[0][:, :, None] & inside[1][:, None, :]).flatten(1).float()
