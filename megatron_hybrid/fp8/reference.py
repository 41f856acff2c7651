"""The float8 linear in plain torch, without a float8 dtype: what ``linear.Float8Linear`` must compute, product by product."""

from __future__ import annotations

from torch import Tensor

from megatron_hybrid.fp8.formats import Float8Format, quantize_reference


def represented(x: Tensor, scale: Tensor, to: Float8Format) -> Tensor:
    """What is left of ``x`` after the cast to float8 and back, in fp64."""
    return quantize_reference(x, scale, to).double() / scale.double()


def float8_linear_reference(
    x_MI: Tensor,
    weight_OI: Tensor,
    dy_MO: Tensor,
    scales: tuple[Tensor, Tensor, Tensor],
    formats: tuple[Float8Format, Float8Format, Float8Format],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [M, O], dx [M, I] and dw [O, I] in fp64, for scales and formats of input, weight and gradient."""
    x_MI, weight_OI, dy_MO = (represented(*each) for each in zip((x_MI, weight_OI, dy_MO), scales, formats, strict=True))
    return x_MI @ weight_OI.t(), dy_MO @ weight_OI, dy_MO.t() @ x_MI
