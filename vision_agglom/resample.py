"""Bilinear sampling of grids as matrix products.

Sampling on a regular, axis-aligned grid is separable: one matrix for the rows, one for the columns. As products the gradient is
deterministic on every device, which torch's interpolate and grid_sample are not on CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bilinear_matrix(positions: Tensor, size: int) -> Tensor:
    """Weights that sample ``size`` points at real-valued positions, linear between neighbours, clamped to the ends.

    Args:
        positions: [..., N] in units of points: 0 is the first, size - 1 the last.
        size: number of points.

    Returns:
        [..., N, size], rows sum to 1.
    """
    points = torch.arange(size, device=positions.device, dtype=positions.dtype)
    return (1 - (positions.clamp(0, size - 1)[..., None] - points).abs()).clamp(min=0)


def resize_positions(count: int, size: int, device: torch.device | None = None) -> Tensor:
    """Where ``count`` cell centres fall among ``size`` cells of the same extent (torch's align_corners=False), [count] float64."""
    return (torch.arange(count, device=device, dtype=torch.float64) + 0.5) * (size / count) - 0.5


def sample_grid(grid: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``rows @ grid @ columns^T`` for every channel.

    Args:
        grid: [H, W, C] or [B, H, W, C].
        rows: [h, H] or [B, h, H].
        columns: [w, W] or [B, w, W].

    Returns:
        [B, h, w, C], or [h, w, C] where nothing has a batch.
    """
    height, width, channels = grid.shape[-3:]
    # The rows first: [.., h, H] x [.., H, W C].
    across = (rows @ grid.reshape(*grid.shape[:-3], height, width * channels)).unflatten(-1, (width, channels))
    return columns.unsqueeze(-3) @ across


def resize_grid(grid_BTC: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Bilinear resize of row-major patch features, equal to torch's interpolate with align_corners=False and no antialiasing.

    Args:
        grid_BTC: [B, rows x columns, C].
        grid: its (rows, columns).
        target: the (rows, columns) wanted.

    Returns:
        [B, target rows x columns, C] in the dtype given.
    """
    if grid == target:
        return grid_BTC
    rows, columns = (
        bilinear_matrix(resize_positions(count, size, grid_BTC.device), size).to(grid_BTC.dtype)
        for count, size in zip(target, grid, strict=True)
    )
    return sample_grid(grid_BTC.unflatten(1, grid), rows, columns).flatten(1, 2)
