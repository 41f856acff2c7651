"""The linear for GPUs: cuBLAS products, and the weight's gradient added to its fp32 buffer by the product itself (``ops/main_grad.py``)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.ops.main_grad import add_product, has_main_grad, mark_added


class _AccumulatingLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return F.linear(x, weight_OI)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        dy_MO, x_MI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = (dy_MO @ weight_OI).view(x.shape) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        if not has_main_grad(weight_OI):
            return dx, dy_MO.t() @ x_MI
        add_product(weight_OI, dy_MO, x_MI)
        return dx, mark_added(weight_OI)


def linear_accumulating(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`linear_reference`; where the weight has a ``main_grad``, its gradient is added there in fp32 and autograd's is a placeholder."""
    return _AccumulatingLinear.apply(x, weight_OI)
