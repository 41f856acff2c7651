"""Bias-free linear map, the matrix product of every projection.

torch sends fp32 products on a CPU to MKL, which reaches half of oneDNN's speed on AMD processors (170 against 350 GFLOP/s on two Zen 5
cores). torch ships oneDNN as well and uses it for bf16; it is reached through the operator that torch's compiler emits for linear layers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_reference(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`x @ weight.T`: x [..., I], weight [O, I], result [..., O]."""
    return x @ weight_OI.t()


def matmul_nt(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """`a @ b.T` in full precision, strides as they come; fp32 on CPU goes to oneDNN. For autograd functions: no gradient of its own."""
    if a_MK.dtype == torch.float32 and a_MK.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")
    return a_MK @ b_NK.t()


def weight_gradient(dy_MO: Tensor, x_MI: Tensor) -> Tensor:
    """`dy.T @ x`, the gradient [O, I] of a linear layer's weight, contiguous."""
    # in fp32 oneDNN is a third faster with the smaller side as the rows of the product
    if dy_MO.dtype != torch.float32 or dy_MO.shape[1] <= x_MI.shape[1]:
        return matmul_nt(dy_MO.t(), x_MI.t())
    return matmul_nt(x_MI.t(), dy_MO.t()).t().contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return matmul_nt(x.reshape(-1, x.shape[-1]), weight_OI).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        dy_MO, x_MI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = matmul_nt(dy_MO, weight_OI.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        dweight_OI = weight_gradient(dy_MO, x_MI) if ctx.needs_input_grad[1] else None
        return dx, dweight_OI


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`linear_reference` with all three products through `matmul_nt`: deterministic, another order of summation."""
    return _Linear.apply(x, weight_OI)
