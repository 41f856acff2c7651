"""Uniform numbers addressed by (seed, position): a sequence's draws depend on nothing else, least of all on its neighbours in a batch.

The counter-based generator is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): its output
function over seed and counter. In 64-bit integers, so every device draws the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15


def uniforms(seed_B: Tensor, position_B: Tensor) -> Tensor:
    """Numbers in [0, 1), fp64 [B], one for each pair of a seed and a position, int64 [B] each."""
    mixed_B = _mix(_mix(seed_B + _signed(_GOLDEN)) + (position_B + 1) * _signed(_GOLDEN))
    return _shifted(mixed_B, 11).double() * 2.0**-53


def _mix(z_B: Tensor) -> Tensor:
    z_B = (z_B ^ _shifted(z_B, 30)) * _signed(0xBF58476D1CE4E5B9)
    z_B = (z_B ^ _shifted(z_B, 27)) * _signed(0x94D049BB133111EB)
    return z_B ^ _shifted(z_B, 31)


def _shifted(z_B: Tensor, num_bits: int) -> Tensor:
    """Logical right shift; torch's own repeats the sign."""
    return torch.bitwise_right_shift(z_B, num_bits) & ((1 << (64 - num_bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
