"""The float8 linear: three matrix products, each of two tensors cast to float8 with one scale per tensor.

    y = x w^T    dx = dy w    dw = dy^T x

Inputs and weights are E4M3 and gradients E5M2 ("hybrid"), or all are E4M3. What is kept for backward are the casts of x and w, not the
tensors themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from megatron_hybrid.config import Fp8Config
from megatron_hybrid.fp8.formats import E4M3, E5M2, Float8Format, quantize
from megatron_hybrid.fp8.products import Product
from megatron_hybrid.fp8.scaling import new_scale
from megatron_hybrid.fp8.statistics import NUM_STATISTICS, merge_statistics, tensor_statistics

ROLES: Final = ("input", "weight", "grad_output")
"""The tensors that are cast, in the order of every tensor's role dimension R."""
_INPUT, _WEIGHT, _GRAD_OUTPUT = range(len(ROLES))


class Float8Linear(torch.nn.Module):
    """The product of one linear, called as ``linear(x, weight)`` is; the weight stays its owner's.

    Under delayed scaling it holds a history of amaxes and the scales made of them. In training mode a call only adds to slot 0 of the
    history, by max, so that neither micro-batches nor recomputation change a scale within a step; ``ScalingState.finish_step`` does that.
    In eval mode scales are used and nothing is recorded.

    Args:
        name: the linear's name in the whole model, which its state has in checkpoints.
        recipe: formats and scaling.
        product: multiplies float8 matrices on this device.
        exact: the product it stands for, in the working precision, which is used while ``enabled`` is false.
    """

    def __init__(self, name: str, recipe: Fp8Config, product: Product, exact: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.recipe, self.product, self.exact = name, recipe, product, exact
        self.formats: tuple[Float8Format, ...] = (E4M3, E4M3, E5M2 if recipe.format == "hybrid" else E4M3)
        self.enabled = True
        self.statistics_RS: Tensor | None = None
        if recipe.recipe == "delayed":
            self.register_buffer("amax_history_RH", torch.zeros(len(ROLES), recipe.delayed.history_length))
            self.register_buffer("scale_R", torch.ones(len(ROLES)))

    def forward(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        """Map [..., I] to [..., O] in the dtype of x; its gradients have the dtypes of x and of the weight."""
        return _Float8Product.apply(x, weight_OI, self) if self.enabled else self.exact(x, weight_OI)

    def observe(self, device: torch.device | None) -> None:
        """Begin to gather statistics anew on ``device``, or stop (None)."""
        self.statistics_RS = None if device is None else torch.zeros(len(ROLES), NUM_STATISTICS, dtype=torch.float64, device=device)

    def cast(self, role: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x`` in its role's format, and the fp32 scalar that its values are multiplied by to get back."""
        scale = self._delayed_scale(role, x) if self.recipe.recipe == "delayed" else self._current_scale(role, x)
        x_8 = quantize(x, scale, self.formats[role])
        if self.training and self.statistics_RS is not None:
            merge_statistics(self.statistics_RS[role], tensor_statistics(x, x_8, scale, self.formats[role]))
        return x_8, scale.reciprocal()

    def _delayed_scale(self, role: int, x: Tensor) -> Tensor:
        if self.training:
            slot = self.amax_history_RH[role, 0]
            torch.maximum(slot, _amax(x), out=slot)
        return self.scale_R[role]

    def _current_scale(self, role: int, x: Tensor) -> Tensor:
        amax = _amax(x)
        return new_scale(amax, torch.ones_like(amax), self.formats[role].largest)


class _Float8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_OI: Tensor, linear: Float8Linear) -> Tensor:
        x_MI, inverse_x = linear.cast(_INPUT, x.reshape(-1, x.shape[-1]))
        w_OI, inverse_w = linear.cast(_WEIGHT, weight_OI)
        ctx.save_for_backward(x_MI, w_OI, inverse_x, inverse_w)
        ctx.linear, ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = linear, x.shape, x.dtype, weight_OI.dtype
        y_MO = linear.product(x_MI, w_OI, inverse_x, inverse_w, out_dtype=x.dtype, fast=True)
        return y_MO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_MI, w_OI, inverse_x, inverse_w = ctx.saved_tensors
        dy_MO, inverse_dy = ctx.linear.cast(_GRAD_OUTPUT, dy.reshape(-1, dy.shape[-1]))
        dx = dweight_OI = None
        if ctx.needs_input_grad[0]:
            dx = ctx.linear.product(dy_MO, w_OI.t(), inverse_dy, inverse_w, out_dtype=ctx.x_dtype, fast=False).view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            dweight_OI = ctx.linear.product(dy_MO.t(), x_MI.t(), inverse_dy, inverse_x, out_dtype=ctx.weight_dtype, fast=False)
        return dx, dweight_OI, None


def _amax(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, float("inf")).float()
