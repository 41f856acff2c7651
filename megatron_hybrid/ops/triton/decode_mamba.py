"""Between a Mamba-2 mixer's two linears while decoding: ``ops.decode.mamba_step`` in two kernels.

The first reads and writes every state once: a program has some channels of one head, convolves what it needs (B and C once more for every
head of their group: a few rows of four taps), updates its tile of the state and multiplies it by C. No program waits for another, because
the ring of the convolution's inputs has one row more than a step reads, and that one is written. The second is the gated norm, whose groups
span heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hybrid.ops.triton.ssd_kernels import softplus

_ENOUGH_PROGRAMS = 1024
"""To keep every multiprocessor of a large GPU busy."""


def mamba_step(
    zxBCdt_BE: Tensor,
    conv_ring_BWC: Tensor,
    ssm_state_BHPN: Tensor,
    position_B: Tensor,
    is_active_B: Tensor,
    *,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_I: Tensor,
    num_groups: int,
    eps: float,
) -> Tensor:
    """``ops.decode.mamba_step``; everything is contiguous. What a sequence that is not active gets back is undefined."""
    batch, num_heads, head_dim, num_states = ssm_state_BHPN.shape
    assert all(t.is_contiguous() for t in (zxBCdt_BE, conv_ring_BWC, ssm_state_BHPN, conv_weight_CW))
    inner = num_heads * head_dim
    y_BI = zxBCdt_BE.new_empty(batch, inner)
    block_p = triton.next_power_of_2(head_dim)
    while block_p > 8 and batch * num_heads * triton.cdiv(head_dim, block_p) < _ENOUGH_PROGRAMS:
        block_p //= 2
    _update_kernel[(batch, num_heads, triton.cdiv(head_dim, block_p))](
        zxBCdt_BE,
        conv_ring_BWC,
        ssm_state_BHPN,
        position_B,
        is_active_B,
        conv_weight_CW,
        conv_bias_C,
        A_log_H,
        D_H,
        dt_bias_H,
        y_BI,
        num_heads=num_heads,
        head_dim=head_dim,
        num_states=num_states,
        num_groups=num_groups,
        num_taps=conv_weight_CW.shape[1],
        BLOCK_P=block_p,
        BLOCK_N=triton.next_power_of_2(num_states),
        num_warps=4,
    )
    width = inner // num_groups
    out_BI = torch.empty_like(y_BI)
    _gated_norm_kernel[(batch, num_groups)](
        y_BI, zxBCdt_BE, norm_weight_I, out_BI, zxBCdt_BE.stride(0), width, inner, eps, BLOCK=triton.next_power_of_2(width), num_warps=4
    )
    return out_BI


@triton.jit
def _update_kernel(
    zxBCdt_ptr,
    ring_ptr,
    state_ptr,
    position_ptr,
    is_active_ptr,
    conv_weight_ptr,
    conv_bias_ptr,
    A_log_ptr,
    D_ptr,
    dt_bias_ptr,
    y_ptr,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    num_states: tl.constexpr,
    num_groups: tl.constexpr,
    num_taps: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(is_active_ptr + sequence) == 0:
        return
    position = tl.load(position_ptr + sequence).to(tl.int32)
    inner: tl.constexpr = num_heads * head_dim
    num_channels: tl.constexpr = inner + 2 * num_groups * num_states
    heads_per_group: tl.constexpr = num_heads // num_groups
    row_ptr = zxBCdt_ptr + sequence * (inner + num_channels + num_heads)
    ring_ptr += sequence * num_taps * num_channels

    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    has_p, has_n = p < head_dim, n < num_states
    group = head // heads_per_group
    x_channel = head * head_dim + p
    B_channel = inner + group * num_states + n
    C_channel = B_channel + num_groups * num_states
    new_ptr = row_ptr + inner
    x_P, new_x_P = _convolve(new_ptr, ring_ptr, conv_weight_ptr, conv_bias_ptr, x_channel, has_p, position, num_channels, num_taps)
    B_N, new_B_N = _convolve(new_ptr, ring_ptr, conv_weight_ptr, conv_bias_ptr, B_channel, has_n, position, num_channels, num_taps)
    C_N, new_C_N = _convolve(new_ptr, ring_ptr, conv_weight_ptr, conv_bias_ptr, C_channel, has_n, position, num_channels, num_taps)
    present_ptr = ring_ptr + (position % num_taps) * num_channels
    tl.store(present_ptr + x_channel, new_x_P, mask=has_p)
    if (head % heads_per_group == 0) & (tl.program_id(2) == 0):
        tl.store(present_ptr + B_channel, new_B_N, mask=has_n)
        tl.store(present_ptr + C_channel, new_C_N, mask=has_n)

    dt = softplus(tl.load(row_ptr + inner + num_channels + head).to(tl.float32) + tl.load(dt_bias_ptr + head))
    decay = tl.exp(-dt * tl.exp(tl.load(A_log_ptr + head)))
    tile_ptr = state_ptr + ((sequence * num_heads + head) * head_dim + p[:, None]) * num_states + n[None, :]
    has_tile = has_p[:, None] & has_n[None, :]
    state_PN = tl.load(tile_ptr, mask=has_tile, other=0.0)
    state_PN = decay * state_PN + (dt * x_P)[:, None] * B_N[None, :]
    tl.store(tile_ptr, state_PN, mask=has_tile)
    y_P = tl.sum(state_PN * C_N[None, :], axis=1) + tl.load(D_ptr + head) * x_P
    tl.store(y_ptr + sequence * inner + x_channel, y_P.to(y_ptr.dtype.element_ty), mask=has_p)


@triton.jit
def _convolve(new_ptr, ring_ptr, weight_ptr, bias_ptr, channel, has_channel, position, num_channels: tl.constexpr, num_taps: tl.constexpr):
    """silu of the convolution at the present position, fp32 rounded as the layer's own is; and the present input as it came."""
    new = tl.load(new_ptr + channel, mask=has_channel, other=0.0)
    tap_ptr = weight_ptr + channel * num_taps
    total = tl.load(bias_ptr + channel, mask=has_channel, other=0.0).to(tl.float32)
    total += tl.load(tap_ptr + num_taps - 1, mask=has_channel, other=0.0).to(tl.float32) * new.to(tl.float32)
    for tap in tl.static_range(num_taps - 1):
        earlier_ptr = ring_ptr + ((position + tap + 1) % num_taps) * num_channels
        earlier = tl.load(earlier_ptr + channel, mask=has_channel, other=0.0).to(tl.float32)
        total += tl.load(tap_ptr + tap, mask=has_channel, other=0.0).to(tl.float32) * earlier
    return (total * tl.sigmoid(total)).to(new.dtype).to(tl.float32), new


@triton.jit
def _gated_norm_kernel(y_ptr, z_ptr, weight_ptr, out_ptr, z_stride, width, inner, eps, BLOCK: tl.constexpr):
    sequence, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, BLOCK)
    channel, is_there = group * width + place, place < width
    y = tl.load(y_ptr + sequence * inner + channel, mask=is_there, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + sequence * z_stride + channel, mask=is_there, other=0.0).to(tl.float32)
    gated = y * z * tl.sigmoid(z)
    scale = tl.rsqrt(tl.sum(gated * gated) / width + eps)
    weight = tl.load(weight_ptr + channel, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out_ptr + sequence * inner + channel, (gated * scale * weight).to(out_ptr.dtype.element_ty), mask=is_there)
