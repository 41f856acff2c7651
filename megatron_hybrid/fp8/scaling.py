"""From amax to scale, and the amax history of delayed scaling, as pure functions of tensors of any leading shape.

A history has one slot per optimizer step. Slot 0 is being filled by the present step; slots 1 to H - 1 hold earlier steps, oldest first.
The conventions are Transformer Engine's, so that histories and scales can be compared with it bit for bit.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def new_scale(amax: Tensor, previous: Tensor, largest: Tensor | float, margin: int = 0) -> Tensor:
    """Return (largest / amax) / 2^margin, which moves amax to the end of the format's range, or ``margin`` powers of two below it.

    Where amax is zero or not finite there is nothing to learn, and the previous scale stays. An amax so small that the quotient overflows
    gives the largest fp32 number; one so large that the inverse would overflow, or the scale be zero, keeps the previous scale too.

    Args:
        amax: largest magnitudes, fp32.
        previous: scales to keep where amax says nothing, of the same shape.
        largest: the format's largest number.
        margin: powers of two left free above amax.
    """
    # One division of two tensors: a number over a tensor would be the number times a rounded reciprocal.
    largest = largest if isinstance(largest, Tensor) else torch.full_like(amax, largest)
    scale = (largest / amax / 2.0**margin).clamp(max=torch.finfo(torch.float32).max)
    is_usable = torch.isfinite(amax) & (amax > 0) & torch.isfinite(scale.reciprocal())
    return torch.where(is_usable, scale, previous)


def window_amax(history_H: Tensor, algorithm: Literal["max", "most_recent"]) -> Tensor:
    """Reduce histories [..., H] over the window: the largest entry, or that of the present step (slot 0)."""
    return history_H.amax(-1) if algorithm == "max" else history_H[..., 0]


def rolled(history_H: Tensor) -> Tensor:
    """Return histories [..., H] with the present step moved behind the others, the oldest dropped, and slot 0 empty for the next."""
    history_H = history_H.roll(-1, -1)
    history_H[..., 0] = 0
    return history_H
