"""Features as colours: the first three principal components of all patches shown, each stretched to [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW, _HIGH = 0.02, 0.98


def pca_colours(spatial_BTC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return float32 [B, rows, columns, 3] in [0, 1].

    The axes are those of all images together, so one colour means one thing in all of them. A component's sign makes its largest loading
    positive; its range is that of the 2nd to the 98th percentile.
    """
    rows_NC = spatial_BTC.detach().flatten(0, 1).double()
    centred_NC = rows_NC - rows_NC.mean(0)
    _, axes_CC = torch.linalg.eigh(centred_NC.T @ centred_NC)
    axes_C3 = axes_CC[:, -3:].flip(1)
    largest_3 = axes_C3.gather(0, axes_C3.abs().argmax(0, keepdim=True))
    components_N3 = centred_NC @ (axes_C3 * largest_3.sign())
    low_3, high_3 = (components_N3.quantile(share, dim=0) for share in (_LOW, _HIGH))
    stretched_N3 = ((components_N3 - low_3) / (high_3 - low_3).clamp_min(1e-12)).clamp(0, 1)
    return stretched_N3.float().view(len(spatial_BTC), *grid, 3)
