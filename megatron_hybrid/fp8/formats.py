"""The two float8 formats and the cast into them (Micikevicius et al. 2022, "FP8 Formats for Deep Learning", section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor


@dataclass(frozen=True)
class Float8Format:
    """One format: what torch calls it, and where its numbers lie."""

    dtype: torch.dtype
    num_mantissa_bits: int
    largest: float
    smallest_normal: float

    @property
    def smallest_subnormal(self) -> float:
        """The least positive number; half of it and everything below rounds to zero."""
        return self.smallest_normal * 2.0**-self.num_mantissa_bits

    @property
    def saturation_point(self) -> float:
        """Half a step beyond the largest number: magnitudes above it lose more than rounding takes."""
        # The largest number is 1.75 times a power of two in either format.
        step = self.largest / 1.75 * 2.0**-self.num_mantissa_bits
        return self.largest + step / 2


E4M3: Final = Float8Format(torch.float8_e4m3fn, 3, 448.0, 2.0**-6)
E5M2: Final = Float8Format(torch.float8_e5m2, 2, 57344.0, 2.0**-14)


def quantize(x: Tensor, scale: Tensor, to: Float8Format) -> Tensor:
    """Cast ``x * scale`` (the product in fp32) to float8: rounded to nearest even, saturated, tiny values flushed to zero.

    Args:
        x: any shape, fp32 or bf16. Infinities saturate, NaN stays NaN.
        scale: fp32 scalar.
        to: the format.

    Returns:
        The values of ``x * scale``, in the format's dtype; they stand for ``x`` after division by the scale.
    """
    return (x.float() * scale).clamp_(-to.largest, to.largest).to(to.dtype)


def quantize_reference(x: Tensor, scale: Tensor, to: Float8Format) -> Tensor:
    """Specification of ``quantize`` by arithmetic, without a float8 dtype: the same values in fp32."""
    scaled = (x.float() * scale).double()
    exponent = torch.floor(torch.log2(scaled.abs().clamp(min=to.smallest_normal, max=to.largest)))
    step = torch.exp2(exponent - to.num_mantissa_bits)
    # torch.round rounds halves to even
    return (torch.round(scaled / step) * step).clamp(-to.largest, to.largest).float()
