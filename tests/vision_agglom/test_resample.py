"""Bilinear sampling as matrix products is torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vision_agglom.resample import bilinear_matrix, resize_grid


@pytest.mark.parametrize("target", [(4, 5), (7, 3), (12, 10), (6, 5)])
def test_resizing_is_torchs(target: tuple[int, int]) -> None:
    grid = torch.rand(2, 30, 7)
    expected = F.interpolate(grid.unflatten(1, (6, 5)).permute(0, 3, 1, 2), target, mode="bilinear", align_corners=False)
    torch.testing.assert_close(resize_grid(grid, (6, 5), target), expected.flatten(2).mT)


def test_positions_outside_repeat_the_ends() -> None:
    matrix = bilinear_matrix(torch.tensor([-3.0, 0.25, 9.0]), 4)
    assert torch.equal(matrix, torch.tensor([[1.0, 0, 0, 0], [0.75, 0.25, 0, 0], [0, 0, 0, 1.0]]))
