"""The matrix product under linears and output layers on GPUs: its signature, and torch's implementation (``cublaslt.py`` has another)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Multiply(Protocol):
    """``a @ b.T``, [M, N], with fp32 sums; for autograd functions: no gradient of its own."""

    def __call__(self, a_MK: Tensor, b_NK: Tensor, *, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
        """Return the product in the dtype of a, or write it to ``out``, or add it to ``out``, which may be fp32 under 16-bit operands."""


def multiply_torch(a_MK: Tensor, b_NK: Tensor, *, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """`Multiply` in torch operations, on any device."""
    if out is None:
        return a_MK @ b_NK.t()
    if not accumulate:
        return torch.mm(a_MK, b_NK.t(), out=out)
    if a_MK.dtype == out.dtype:
        return out.addmm_(a_MK, b_NK.t())
    return torch.addmm(out, a_MK, b_NK.t(), out_dtype=out.dtype, out=out)
