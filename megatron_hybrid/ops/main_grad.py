"""Weight gradients added where the data-parallel wrapper keeps them: ``weight.main_grad``, fp32, over all micro-batches of a step.

megatron-core's wrapper otherwise takes a bf16 gradient from autograd and adds it to main_grad in a pass of its own. Here the matrix product
itself adds, in fp32, so that the bf16 rounding of each micro-batch's gradient falls away too.
"""

from __future__ import annotations

from torch import Tensor

from megatron_hybrid.ops.product import Multiply, multiply_torch


def has_main_grad(weight: Tensor) -> bool:
    """Whether the data-parallel wrapper keeps a gradient buffer for this weight, and the weight is trained."""
    return weight.requires_grad and getattr(weight, "main_grad", None) is not None


def add_product(weight_OI: Tensor, dy_MO: Tensor, x_MI: Tensor, multiply: Multiply = multiply_torch) -> None:
    """Add ``dy.T @ x`` to ``weight.main_grad`` in one matrix product."""
    multiply(dy_MO.t(), x_MI.t(), out=weight_OI.main_grad, accumulate=True)


def gradient_from_product(weight_OI: Tensor, dy_MO: Tensor, x_MI: Tensor, multiply: Multiply = multiply_torch) -> Tensor:
    """What autograd gets for a linear's weight: ``dy.T @ x``, or the placeholder for it where the product was added to ``main_grad``."""
    if not has_main_grad(weight_OI):
        return multiply(dy_MO.t(), x_MI.t())
    add_product(weight_OI, dy_MO, x_MI, multiply)
    return mark_added(weight_OI)


def mark_added(weight: Tensor) -> Tensor:
    """Tell the wrapper that main_grad already holds this micro-batch's gradient; return what autograd gets in the gradient's place.

    All uses of the weight in a pass must add to main_grad themselves: the wrapper then takes nothing from autograd.
    The wrapper's hook wants a tensor of the weight's shape and dtype and never reads it: it gets a view of main_grad's own memory, which
    costs nothing.
    """
    weight.grad_added_to_main_grad = True
    return weight.main_grad.view(weight.dtype).flatten()[: weight.numel()].view(weight.shape)
