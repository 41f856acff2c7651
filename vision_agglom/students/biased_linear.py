"""The linear with bias for GPUs: one product that adds the bias as it writes, and adds the weight's gradient where the data-parallel
wrapper keeps it (``megatron_hybrid/ops/main_grad.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hybrid.ops.main_grad import gradient_from_product


class _BiasedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
        # In two dimensions: with more, torch adds the bias in a pass of its own unless x is contiguous.
        x_MI = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(x_MI, weight_OI)
        return torch.addmm(bias_O, x_MI, weight_OI.t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_MI, weight_OI = ctx.saved_tensors
        dy_MO = dy.reshape(-1, dy.shape[-1])
        dx = (dy_MO @ weight_OI).view(*dy.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        dbias_O = dy_MO.sum(0) if ctx.needs_input_grad[2] else None
        return dx, gradient_from_product(weight_OI, dy_MO, x_MI) if ctx.needs_input_grad[1] else None, dbias_O


def biased_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """``x @ weight.T + bias``: x [..., I], weight [O, I], bias [O], all of one dtype -> [..., O]."""
    return _BiasedLinear.apply(x, weight_OI, bias_O)
