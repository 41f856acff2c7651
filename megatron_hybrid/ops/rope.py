"""Rotary position embedding, half-rotation convention of Megatron and GPT-NeoX (Su et al. 2021, "RoFormer", section 3.2.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(positions_L: Tensor, rotary_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, two fp32 tensors [L, rotary_dim / 2]; computed once and shared by all layers.

    `positions_L` holds token positions (integers, any offset), angle i is `position * base ** (-2 i / rotary_dim)`.
    Raises ValueError when `rotary_dim` is odd or not positive.
    """
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be a positive even number of channels, got {rotary_dim}; round it to even")
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=positions_L.device) / rotary_dim
    angles = positions_L.to(torch.float64)[:, None] * torch.pow(base, -exponents)[None, :]
    return angles.cos().float(), angles.sin().float()


def apply_rope(x_BLHP: Tensor, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
    """Rotate the first `2 * R` channels of every head, channel i with channel i + R; the channels behind them pass unchanged.

    x_BLHP: any floating dtype; the rotation is computed in fp32 (fp64 for fp64) and returned in the dtype of x.
    """
    half = cos_LR.shape[-1]
    if 2 * half > x_BLHP.shape[-1]:
        raise ValueError(f"the tables rotate {2 * half} channels but the heads have {x_BLHP.shape[-1]}; build them for at most head_dim")
    cos, sin = cos_LR[:, None, :], sin_LR[:, None, :]
    first, second, rest = x_BLHP[..., :half], x_BLHP[..., half : 2 * half], x_BLHP[..., 2 * half :]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BLHP.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated
