"""RankMe: how many directions features fill (Garrido et al. 2023, arXiv 2210.02885, equation 1).

    RankMe = exp(-sum_k p_k ln p_k),   p_k = s_k / sum_j s_j + eps

with s the singular values of the [rows, channels] matrix of features. From 1 (all rows along one line) to the number of channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-7


class RankMe:
    """Accumulates the Gram matrix F^T F, whose eigenvalues are the squared singular values, in float64.

    Rows stream by; nothing but [C, C] is kept.
    """

    def __init__(self) -> None:
        self._gram_CC: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Count rows [..., C]."""
        rows_NC = features.detach().flatten(0, -2).double()
        gram_CC = rows_NC.T @ rows_NC
        self._gram_CC = gram_CC if self._gram_CC is None else self._gram_CC + gram_CC

    def result(self) -> float:
        """Return RankMe of all rows so far.

        Raises:
            ValueError: there are none, or all are zero.
        """
        if self._gram_CC is None:
            raise ValueError("no features were counted: the evaluation has no images")
        eigenvalues_C = torch.linalg.eigvalsh(self._gram_CC)
        # What rounding leaves of a zero eigenvalue would become a singular value of 1e-8 of the largest.
        floor = eigenvalues_C[-1] * len(eigenvalues_C) * torch.finfo(torch.float64).eps
        values_C = torch.where(eigenvalues_C > floor, eigenvalues_C, torch.zeros_like(eigenvalues_C)).sqrt()
        if float(values_C.sum()) == 0:
            raise ValueError("RankMe of features that are all zero is not defined")
        shares_C = values_C / values_C.sum() + _EPS
        return float((-(shares_C * shares_C.log()).sum()).exp())
