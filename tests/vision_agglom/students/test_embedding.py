"""Cropped position embeddings: torch's sampling, drawn per sample and step, and any resolution from one table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vision_agglom.resample import sample_grid
from vision_agglom.students.embedding import crop_matrix, cut_patches, draw_crop, fixed_window

SIDE = 16


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(SIDE, SIDE, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", [(6, 6), (4, 9), (20, 20)])
def test_crops_are_grid_samples(grid: tuple[int, int], table: torch.Tensor) -> None:
    crops = np.stack([draw_crop(1, 2, sample) for sample in range(3)])
    rows, columns = (crop_matrix(crops[:, axis], crops[:, 2 + axis], count, SIDE) for axis, count in enumerate(grid))
    ours = sample_grid(table, rows, columns)
    for crop, positions in zip(crops, ours, strict=True):
        top, left, height, width = crop
        y, x = torch.linspace(0, 1, grid[0]) * height + top, torch.linspace(0, 1, grid[1]) * width + left
        places = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1).double() * 2 - 1
        expected = F.grid_sample(table.permute(2, 0, 1)[None], places[None], mode="bilinear", align_corners=True)
        torch.testing.assert_close(positions, expected[0].permute(1, 2, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [(8, 8), (5, 12), (16, 16), (24, 24)])
def test_evaluation_takes_the_top_left_of_a_resized_square(grid: tuple[int, int], table: torch.Tensor) -> None:
    expected = F.interpolate(table.permute(2, 0, 1)[None], (max(grid), max(grid)), mode="bilinear", align_corners=False)
    ours = sample_grid(table, *fixed_window(grid, SIDE))
    torch.testing.assert_close(ours, expected[0, :, : grid[0], : grid[1]].permute(1, 2, 0))


def test_crops_lie_inside_and_follow_seed_step_and_sample() -> None:
    crops = np.stack([draw_crop(0, step, sample) for step in range(20) for sample in range(20)])
    assert (crops[:, :2] >= 0).all() and (crops[:, :2] + crops[:, 2:] <= 1 + 1e-12).all()
    scale = np.sqrt(crops[:, 2] * crops[:, 3])
    assert scale.min() > 0.3 and scale.max() > 0.9
    assert len(np.unique(crops, axis=0)) == len(crops)
    np.testing.assert_array_equal(draw_crop(0, 3, 4), draw_crop(0, 3, 4))
    assert not np.array_equal(draw_crop(0, 3, 4), draw_crop(1, 3, 4))


def test_patches_are_what_a_convolution_sees() -> None:
    images, weight = torch.randn(2, 3, 24, 16), torch.randn(7, 3, 8, 8)
    expected = F.conv2d(images, weight, stride=8).flatten(2).mT
    torch.testing.assert_close(cut_patches(images, 8) @ weight.flatten(1).T, expected, rtol=1e-4, atol=1e-4)


def test_images_that_no_patch_divides() -> None:
    with pytest.raises(ValueError, match="30 x 16 pixels do not divide into patches of 8"):
        cut_patches(torch.zeros(1, 3, 30, 16), 8)
