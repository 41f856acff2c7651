"""Both products of an MLP and the squared ReLU between them in float8, so that neither the activation nor its gradient is ever written in
more than 8 bits.

    inner = x w1^T    y = max(inner, 0)^2    out = y w2^T

The casts of y and of the gradient of inner read what the products wrote, apply the activation or its derivative, and cast, in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hybrid.fp8.linear import GRAD_OUTPUT, INPUT, Float8Linear, Float8Matrix, backward_follows


def float8_mlp(x: Tensor, w1_FI: Tensor, w2_OF: Tensor, fc1: Float8Linear, fc2: Float8Linear, *, recompute: bool) -> Tensor:
    """``fc2(squared_relu(fc1(x, w1)), w2)``: [..., I] to [..., O], with the activation in fp32 and not rounded to the working precision.

    With ``recompute`` the cast activation is made again in backward instead of kept.
    """
    return _Float8Mlp.apply(x, w1_FI, w2_OF, fc1, fc2, recompute, backward_follows(x, w1_FI, w2_OF))


class _Float8Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, w1_FI: Tensor, w2_OF: Tensor, fc1: Float8Linear, fc2: Float8Linear, recompute: bool, columns: bool
    ) -> Tensor:
        x_8, w1_8 = fc1.cast(INPUT, x.reshape(-1, x.shape[-1]), columns=columns), fc1.cast_weight(w1_FI, columns=columns)
        inner_MF = fc1.output(x_8, w1_8, x.dtype)
        y_8 = fc2.cast(INPUT, inner_MF, prologue="squared_relu", columns=columns and not recompute)
        w2_8 = fc2.cast_weight(w2_OF, columns=columns)
        matrices = (x_8, y_8, w1_8, w2_8)
        ctx.save_for_backward(inner_MF, w1_FI, w2_OF, *(each.columns_KM for each in matrices), *(each.inverse_scale for each in matrices))
        ctx.fc1, ctx.fc2, ctx.x_shape, ctx.recompute = fc1, fc2, x.shape, recompute
        return fc2.output(y_8, w2_8, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        inner_MF, w1_FI, w2_OF, *rest = ctx.saved_tensors
        x_8, y_8, w1_8, w2_8 = (Float8Matrix(None, columns, inverse) for columns, inverse in zip(rest[:4], rest[4:], strict=True))
        fc1: Float8Linear = ctx.fc1
        fc2: Float8Linear = ctx.fc2
        if ctx.recompute:
            y_8 = fc2.cast(INPUT, inner_MF, prologue="squared_relu", rows=False)
        needs_dx, needs_dw1, needs_dw2, *_ = ctx.needs_input_grad
        dout_8 = fc2.cast(GRAD_OUTPUT, dout.reshape(-1, dout.shape[-1]))
        dw2_OF = fc2.weight_gradient(dout_8, y_8, w2_OF) if needs_dw2 else None
        dy_MF = fc2.input_gradient(dout_8, w2_8, inner_MF.dtype)
        dinner_8 = fc1.cast(GRAD_OUTPUT, dy_MF, prologue="squared_relu_backward", other_MK=inner_MF)
        dw1_FI = fc1.weight_gradient(dinner_8, x_8, w1_FI) if needs_dw1 else None
        dx = fc1.input_gradient(dinner_8, w1_8, inner_MF.dtype).view(ctx.x_shape) if needs_dx else None
        return dx, dw1_FI, dw2_OF, None, None, None, None
