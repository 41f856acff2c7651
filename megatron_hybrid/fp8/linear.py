"""The float8 linear: three matrix products, each of two tensors cast to float8 with one scale per tensor.

    y = x w^T    dx = dy w    dw = dy^T x

Inputs and weights are E4M3 and gradients E5M2 ("hybrid"), or all are E4M3. What is kept for backward are the casts of x and w, not the
tensors themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from megatron_hybrid.config import Fp8Config
from megatron_hybrid.fp8.backends import Backend, Prologue, apply_prologue
from megatron_hybrid.fp8.formats import E4M3, E5M2, Float8Format
from megatron_hybrid.fp8.statistics import NUM_STATISTICS, merge_statistics, tensor_statistics
from megatron_hybrid.ops.main_grad import has_main_grad, mark_added

ROLES: Final = ("input", "weight", "grad_output")
"""The tensors that are cast, in the order of every tensor's role dimension R."""
INPUT, WEIGHT, GRAD_OUTPUT = range(len(ROLES))


@dataclass(frozen=True)
class Float8Matrix:
    """A cast matrix: as it is, transposed, or both; a product reads whichever has its inner dimension last."""

    rows_MK: Tensor | None
    columns_KM: Tensor | None
    inverse_scale: Tensor


class Float8Linear(torch.nn.Module):
    """The product of one linear, called as ``linear(x, weight)`` is; the weight stays its owner's.

    Under delayed scaling it holds a history of amaxes and the scales made of them. In training mode a call only adds to slot 0 of the
    history, by max, so that neither micro-batches nor recomputation change a scale within a step; ``ScalingState.finish_step`` does that.
    In eval mode scales are used and nothing is recorded.

    Args:
        name: the linear's name in the whole model, which its state has in checkpoints.
        recipe: formats and scaling.
        backend: casts and multiplies on this device.
        exact: the product it stands for, in the working precision, which is used while ``enabled`` is false.
    """

    def __init__(self, name: str, recipe: Fp8Config, backend: Backend, exact: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.recipe, self.backend, self.exact = name, recipe, backend, exact
        self.formats: tuple[Float8Format, ...] = (E4M3, E4M3, E5M2 if recipe.format == "hybrid" else E4M3)
        self.enabled = True
        self.statistics_RS: Tensor | None = None
        self._held: Float8Matrix | None = None
        self._held_address: int | None = None
        if recipe.recipe == "delayed":
            self.register_buffer("amax_history_RH", torch.zeros(len(ROLES), recipe.delayed.history_length))
            self.register_buffer("scale_R", torch.ones(len(ROLES)))
            # The first of each row is used; rows are 16 bytes apart, because cuBLASLt reads a scale at no other address.
            self.register_buffer("inverse_scale_RA", torch.ones(len(ROLES), 4), persistent=False)

    def forward(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        """Map [..., I] to [..., O] in the dtype of x; its gradients have the dtypes of x and of the weight."""
        return _Float8Product.apply(x, weight_OI, self, backward_follows(x, weight_OI)) if self.enabled else self.exact(x, weight_OI)

    def set_scales(self, scale_R: Tensor) -> None:
        """Take over scales of delayed scaling, and make their inverses."""
        self.scale_R.copy_(scale_R)
        self.inverse_scale_RA[:, 0] = self.scale_R.reciprocal()

    def observe(self, device: torch.device | None) -> None:
        """Begin to gather statistics anew on ``device``, or stop (None)."""
        self.statistics_RS = None if device is None else torch.zeros(len(ROLES), NUM_STATISTICS, dtype=torch.float64, device=device)

    def hold_weight(self, weight_OI: Tensor) -> None:
        """Cast the weight now, and use this cast until ``release_weight``: it stays what it is over the micro-batches of a step.

        The memory is kept and written anew each time, so that a CUDA graph finds it.
        """
        into = None if self._held is None else (self._held.rows_MK, self._held.columns_KM, self._held.inverse_scale)
        self._held = self.cast(WEIGHT, weight_OI.detach(), into=into)
        self._held_address = weight_OI.data_ptr()

    def release_weight(self) -> None:
        """Cast the weight at every call again."""
        self._held_address = None

    def cast_weight(self, weight_OI: Tensor, *, columns: bool) -> Float8Matrix:
        """The cast weight: the held one if it is of this weight's memory, or a fresh one, transposed too if ``columns`` are wanted."""
        return self._held if self._held_address == weight_OI.data_ptr() else self.cast(WEIGHT, weight_OI, columns=columns)

    def cast(
        self,
        role: int,
        x_MK: Tensor,
        *,
        prologue: Prologue = "none",
        other_MK: Tensor | None = None,
        rows: bool = True,
        columns: bool = True,
        into: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Float8Matrix:
        """Cast what the prologue makes of ``x`` to its role's format; ``into`` are rows, columns and inverse scale to write to."""
        to = self.formats[role]
        amax = None
        if self.recipe.recipe == "delayed":
            scale, inverse = self.scale_R[role], self.inverse_scale_RA[role, 0]
            amax = self.amax_history_RH[role, 0] if self.training else None
        else:
            scale, inverse = self.backend.scales(self.backend.amax(x_MK, prologue=prologue, other_MK=other_MK), to)
            if into is not None:
                inverse = into[2].copy_(inverse)
        x_8, x_8_transposed = self.backend.cast(
            x_MK,
            scale,
            to,
            amax=amax,
            prologue=prologue,
            other_MK=other_MK,
            rows=rows,
            columns=columns,
            into=None if into is None else into[:2],
        )
        if self.training and self.statistics_RS is not None:
            some = x_8 if x_8 is not None else x_8_transposed.t()
            merge_statistics(self.statistics_RS[role], tensor_statistics(apply_prologue(x_MK, prologue, other_MK), some, scale, to))
        return Float8Matrix(x_8, x_8_transposed, inverse)

    def output(self, x: Float8Matrix, weight: Float8Matrix, dtype: torch.dtype) -> Tensor:
        """y = x w^T, [M, O]."""
        return self.backend.product(x.rows_MK, weight.rows_MK, x.inverse_scale, weight.inverse_scale, out_dtype=dtype, fast=True)

    def input_gradient(self, dy: Float8Matrix, weight: Float8Matrix, dtype: torch.dtype) -> Tensor:
        """dx = dy w, [M, I]."""
        return self.backend.product(dy.rows_MK, weight.columns_KM, dy.inverse_scale, weight.inverse_scale, out_dtype=dtype, fast=False)

    def weight_gradient(self, dy: Float8Matrix, x: Float8Matrix, weight_OI: Tensor) -> Tensor:
        """dw = dy^T x, [O, I], or the placeholder for it where it was added to the weight's ``main_grad``."""
        add_to = weight_OI.main_grad if has_main_grad(weight_OI) else None
        dweight_OI = self.backend.product(
            dy.columns_KM, x.columns_KM, dy.inverse_scale, x.inverse_scale, out_dtype=weight_OI.dtype, fast=False, add_to=add_to
        )
        return dweight_OI if add_to is None else mark_added(weight_OI)


def backward_follows(*tensors: Tensor) -> bool:
    """Whether a backward pass may follow on what is made of ``tensors``: backward alone reads transposed casts of forward's tensors.

    To be asked before a ``torch.autograd.Function``, within whose forward gradients are always off.
    """
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _Float8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_OI: Tensor, linear: Float8Linear, columns: bool) -> Tensor:
        x_8, w_8 = linear.cast(INPUT, x.reshape(-1, x.shape[-1]), columns=columns), linear.cast_weight(weight_OI, columns=columns)
        ctx.save_for_backward(weight_OI, x_8.columns_KM, w_8.columns_KM, x_8.inverse_scale, w_8.inverse_scale)
        ctx.linear, ctx.x_shape, ctx.x_dtype = linear, x.shape, x.dtype
        return linear.output(x_8, w_8, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, x_IM, w_IO, inverse_x, inverse_w = ctx.saved_tensors
        linear: Float8Linear = ctx.linear
        needs_dx, needs_dweight, *_ = ctx.needs_input_grad
        dy_8 = linear.cast(GRAD_OUTPUT, dy.reshape(-1, dy.shape[-1]), rows=needs_dx, columns=needs_dweight)
        dx = dweight_OI = None
        if needs_dx:
            dx = linear.input_gradient(dy_8, Float8Matrix(None, w_IO, inverse_w), ctx.x_dtype).view(ctx.x_shape)
        if needs_dweight:
            dweight_OI = linear.weight_gradient(dy_8, Float8Matrix(None, x_IM, inverse_x), weight_OI)
        return dx, dweight_OI, None, None
