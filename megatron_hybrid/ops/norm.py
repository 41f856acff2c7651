"""RMSNorm (Zhang and Sennrich 2019) and the gated, grouped RMSNorm behind the Mamba-2 scan (Dao and Gu 2024, section 7.2), fp32 statistics.

Nemotron-H gates first and normalises afterwards, over groups of d_inner / num_groups channels, which keeps the norm local to a
tensor-parallel rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last axis, in fp32 (fp64 for fp64), returned in the dtype of x."""
    x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (normalised * weight_D).to(x.dtype)


def gated_rms_norm_reference(y: Tensor, gate: Tensor, weight_D: Tensor, num_groups: int, eps: float) -> Tensor:
    """RMSNorm of `y * silu(gate)` within each of `num_groups` equal groups of channels, times weight [D]; y and gate [..., D]."""
    check_groups(y.shape[-1], num_groups)
    gated = y.to(torch.promote_types(y.dtype, torch.float32)) * F.silu(gate.to(torch.promote_types(gate.dtype, torch.float32)))
    grouped = gated.unflatten(-1, (num_groups, -1))
    normalised = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    return (normalised.flatten(-2) * weight_D).to(y.dtype)


def check_groups(num_channels: int, num_groups: int) -> None:
    if num_groups <= 0 or num_channels % num_groups:
        raise ValueError(f"{num_channels} channels do not divide into {num_groups} norm groups; it must divide this rank's channels")


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`rms_norm_reference` as one autograd function: keeps its input and one number per row."""
    if _sequence_first(x):
        return _RMSNorm.apply(x.transpose(0, 1), weight_D, eps).transpose(0, 1)
    return _RMSNorm.apply(x, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / rms(x) and t = dy * x: dweight = t^T r, dx = r dy w - x r^3 (t w) / D; both sums over t are matrix-vector products."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_ND = _rows(x)
        r_N1 = _reciprocal_rms(x_ND, eps)
        ctx.save_for_backward(x, weight_D, r_N1)
        return torch.mul(x_ND, r_N1).mul_(weight_D).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, r_N1 = ctx.saved_tensors
        x_ND, dy_ND, weight_wide_D = _rows(x), _rows(dy), weight_D.to(r_N1.dtype)
        product_ND = dy_ND * x_ND
        dweight_D = product_ND.t() @ r_N1[:, 0]
        correction_N1 = r_N1**3 * (product_ND @ weight_wide_D)[:, None] / x.shape[-1]
        dx_ND = torch.mul(dy_ND, weight_wide_D, out=product_ND).mul_(r_N1).addcmul_(x_ND, correction_N1, value=-1)
        return dx_ND.to(x.dtype).view(x.shape), dweight_D.to(weight_D.dtype), None


def gated_rms_norm(y: Tensor, gate: Tensor, weight_D: Tensor, num_groups: int, eps: float) -> Tensor:
    """`gated_rms_norm_reference` as one autograd function: keeps y, gate and one number per row and group."""
    check_groups(y.shape[-1], num_groups)
    if _sequence_first(y):
        return _GatedRMSNorm.apply(y.transpose(0, 1), gate.transpose(0, 1), weight_D, num_groups, eps).transpose(0, 1)
    return _GatedRMSNorm.apply(y, gate, weight_D, num_groups, eps)


class _GatedRMSNorm(torch.autograd.Function):
    """`_RMSNorm` of u = y silu(gate) per group."""

    @staticmethod
    def forward(ctx, y: Tensor, gate: Tensor, weight_D: Tensor, num_groups: int, eps: float) -> Tensor:
        gated_NGD = F.silu(_rows(gate)).mul_(_rows(y)).unflatten(-1, (num_groups, -1))
        r_NG1 = _reciprocal_rms(gated_NGD, eps)
        ctx.save_for_backward(y, gate, weight_D, r_NG1)
        return gated_NGD.mul_(r_NG1).flatten(-2).mul_(weight_D).to(y.dtype).view(y.shape)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        y, gate, weight_D, r_NG1 = ctx.saved_tensors
        groups = (r_NG1.shape[1], -1)
        y_ND, gate_ND, dout_ND = _rows(y), _rows(gate), _rows(dout)
        silu_ND = F.silu(gate_ND)
        gated_NGD = (y_ND * silu_ND).unflatten(-1, groups)
        dscaled_NGD = (dout_ND * weight_D).unflatten(-1, groups)
        product_NGD = dout_ND.unflatten(-1, groups) * gated_NGD
        dweight_D = (product_NGD * r_NG1).sum(0).flatten()
        correction_NG1 = r_NG1**3 * torch.mul(dscaled_NGD, gated_NGD, out=product_NGD).mean(-1, keepdim=True)
        dgated_ND = dscaled_NGD.mul_(r_NG1).addcmul_(gated_NGD, correction_NG1, value=-1).flatten(-2)
        dy_ND = silu_ND.mul_(dgated_ND)
        dgate_ND = torch.ops.aten.silu_backward(dgated_ND.mul_(y_ND), gate_ND)
        return dy_ND.to(y.dtype).view(y.shape), dgate_ND.to(gate.dtype).view(gate.shape), dweight_D.to(weight_D.dtype), None, None


def _sequence_first(x: Tensor) -> bool:
    """Whether x [B, L, D] is a transposed view of an [L, B, D] tensor, which stacks into rows without a copy only when transposed back."""
    return x.dim() == 3 and x.stride(0) < x.stride(1)


def _rows(x: Tensor) -> Tensor:
    """x as rows of its last axis, in fp32 or wider; a view where the strides and the dtype allow it."""
    return x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
