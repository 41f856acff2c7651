"""The linear for GPUs: the weight's gradient is added to its fp32 buffer by the product itself (``ops/main_grad.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hybrid.ops import cublaslt
from megatron_hybrid.ops.main_grad import gradient_from_product
from megatron_hybrid.ops.product import Multiply, multiply_torch


class _AccumulatingLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_OI: Tensor, multiply: Multiply) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.multiply = multiply
        return multiply(x.reshape(-1, x.shape[-1]), weight_OI).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_OI = ctx.saved_tensors
        dy_MO, x_MI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = ctx.multiply(dy_MO, weight_OI.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, gradient_from_product(weight_OI, dy_MO, x_MI, ctx.multiply) if ctx.needs_input_grad[1] else None, None


def linear_cublas(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`linear_reference` through torch; where the weight has a ``main_grad``, its gradient is added there in fp32 and autograd's is a
    placeholder."""
    return _AccumulatingLinear.apply(x, weight_OI, multiply_torch)


def linear_cublaslt(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`linear_cublas` through cuBLASLt by algorithms of our choice (``ops/cublaslt.py``)."""
    return _AccumulatingLinear.apply(x, weight_OI, cublaslt.multiply)
