"""Bias-free linear map. On CPU, fp32 products go to oneDNN: torch sends them to MKL, whose kernels on other vendors' processors are 2 to 3 times slower."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_reference(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`x @ weight.T`: x [..., I], weight [O, I], result [..., O]."""
    return x @ weight_OI.t()


def matmul_nt(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """`a @ b.T` in full precision through oneDNN where that is faster (fp32 on CPU), through torch otherwise."""
    if a_MK.dtype == torch.float32 and a_MK.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")
    return a_MK @ b_NK.t()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return matmul_nt(x.reshape(-1, x.shape[-1]), weight_OI).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        dx = dweight = None
        dy_MO, x_MI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[0]:
            dx = matmul_nt(dy_MO, weight_OI.t().contiguous()).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = weight_gradient(dy_MO, x_MI)
        return dx, dweight


def weight_gradient(dy_MO: Tensor, x_MI: Tensor) -> Tensor:
    """`dy.T @ x`, the gradient [O, I] of a linear layer's weight."""
    return matmul_nt(x_MI.t().contiguous(), dy_MO.t()).t()


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`linear_reference` through oneDNN in all three products. Deterministic; differs from the reference by the order of summation only."""
    return _Linear.apply(x, weight_OI)
