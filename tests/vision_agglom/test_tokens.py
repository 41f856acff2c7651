"""Student and teacher meet on the coarser grid; shifted windows are compared where they overlap, and nowhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vision_agglom.resample import resize_grid
from vision_agglom.tokens import View, match_grids


@pytest.mark.parametrize(("grid", "target"), [((7, 7), (4, 4)), ((4, 6), (9, 5)), ((5, 5), (5, 5))])
def test_resize_is_torchs(grid: tuple[int, int], target: tuple[int, int]) -> None:
    features = torch.randn(2, grid[0] * grid[1], 3, dtype=torch.float64)
    expected = F.interpolate(features.mT.unflatten(2, grid), target, mode="bilinear", align_corners=False).flatten(2).mT
    torch.testing.assert_close(resize_grid(features, grid, target), expected)


@pytest.mark.parametrize(("student", "teacher"), [((7, 7), (4, 4)), ((4, 4), (7, 7))])
def test_the_finer_grid_is_resampled(student: tuple[int, int], teacher: tuple[int, int]) -> None:
    mine, theirs = torch.randn(2, student[0] ** 2, 3), torch.randn(2, teacher[0] ** 2, 3)
    matched = match_grids(mine, View.whole(student, 56, 2), theirs, View.whole(teacher, 56, 2))
    assert matched.mask_BT is None
    torch.testing.assert_close(matched.student_BTC, resize_grid(mine, student, (4, 4)))
    torch.testing.assert_close(matched.teacher_BTC, resize_grid(theirs, teacher, (4, 4)))


def test_equal_grids_are_left_alone() -> None:
    mine, theirs = torch.randn(2, 16, 3), torch.randn(2, 16, 3)
    matched = match_grids(mine, View.whole((4, 4), 32, 2), theirs, View.whole((4, 4), 32, 2))
    assert matched.student_BTC is mine and matched.teacher_BTC is theirs


def position_features(view: View) -> torch.Tensor:
    """What a perfect network would say of each patch: where on the canvas its centre is."""
    rows, columns = view.centres(0), view.centres(1)
    grid = torch.stack([rows[:, :, None].expand(-1, -1, columns.shape[1]), columns[:, None, :].expand(-1, rows.shape[1], -1)], -1)
    return grid.flatten(1, 2)


@pytest.mark.parametrize("teacher_grid", [(4, 4), (3, 3), (8, 8)])
def test_shifted_windows_are_compared_at_the_same_places(teacher_grid: tuple[int, int]) -> None:
    """Features that tell canvas positions agree exactly wherever the mask counts them."""
    student = View((4, 4), torch.tensor([0.0, 16.0]), torch.tensor([8.0, 0.0]), 32.0)
    teacher = View(teacher_grid, torch.tensor([8.0, 0.0]), torch.tensor([0.0, 8.0]), 32.0)
    matched = match_grids(position_features(student), student, position_features(teacher), teacher)
    assert matched.mask_BT is not None
    inside = matched.mask_BT.bool()
    assert inside.any(1).all() and not inside.all()
    torch.testing.assert_close(matched.student_BTC[inside], matched.teacher_BTC[inside], rtol=1e-12, atol=1e-12)
    outside = (matched.student_BTC - matched.teacher_BTC).abs().amax(-1)[~inside]
    assert (outside > 1e-6).all()
