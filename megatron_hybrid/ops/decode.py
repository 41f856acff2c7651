"""One token for every sequence of a batch: the operations of a decoding step, specified in plain torch.

A step at batch B reads every weight and every cache once, so on a GPU it is bound by memory: the kernels beside these
(``triton/decode_*.py``) differ in how often they touch it. Sequences stand at positions of their own; one that is not active computes
whatever it likes and leaves its caches alone. Caches are updated in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hybrid.ops.conv1d import causal_conv1d_step
from megatron_hybrid.ops.linear import matmul_nt
from megatron_hybrid.ops.norm import gated_rms_norm, rms_norm
from megatron_hybrid.ops.ssd import ssd_step


@dataclass(frozen=True)
class DecodeOps:
    """The operations of a step; signatures stand with the specifications below."""

    norm_linear: Callable
    linear: Callable
    mamba_step: Callable
    attention_step: Callable


def norm_linear(x_BD: Tensor, norm_weight_D: Tensor, weight_OD: Tensor, eps: float, *, squared_relu: bool = False) -> Tensor:
    """``rms_norm(x) @ weight.T``, [B, O], and ``max(., 0) ** 2`` of it where asked for."""
    y_BO = matmul_nt(rms_norm(x_BD, norm_weight_D, eps), weight_OD)
    return torch.relu(y_BO).square() if squared_relu else y_BO


def linear(x_BI: Tensor, weight_OI: Tensor, residual_BO: Tensor | None) -> Tensor:
    """``residual + x @ weight.T``, [B, O]."""
    y_BO = matmul_nt(x_BI, weight_OI)
    return y_BO if residual_BO is None else residual_BO + y_BO


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
    """What a Mamba-2 mixer does between its two linears: convolution, state update, gated norm. Returns [B, I] in the dtype of its input.

    Args:
        zxBCdt_BE: the first linear's output, rows z and x (I = H P each), B and C (G N each), dt (H).
        conv_ring_BWC: the last W inputs of the convolution, that of position p at p % W; the present one is written.
        ssm_state_BHPN: the state before this token, fp32; becomes that after it.
        position_B: int64, tokens before this one.
        is_active_B: bool.
        conv_weight_CW, conv_bias_C: of the convolution over C = I + 2 G N channels.
        A_log_H, D_H, dt_bias_H: fp32.
        norm_weight_I: of the gated norm over G groups of channels.
        num_groups: G.
        eps: of the norm.
    """
    num_taps = conv_weight_CW.shape[1]
    (num_heads, head_dim, num_states), num_channels = ssm_state_BHPN.shape[1:], conv_weight_CW.shape[0]
    inner = num_heads * head_dim
    z_BI, xBC_BC, dt_BH = zxBCdt_BE.split([inner, num_channels, num_heads], dim=-1)

    before_BT = (position_B[:, None] - num_taps + 1 + torch.arange(num_taps - 1, device=position_B.device)) % num_taps
    state_BTC = conv_ring_BWC.gather(1, before_BT[..., None].expand(-1, -1, num_channels))
    convolved_BC, _ = causal_conv1d_step(state_BTC, xBC_BC, conv_weight_CW, conv_bias_C)
    present_B1C = (position_B % num_taps)[:, None, None].expand(-1, 1, num_channels)
    kept_B1C = torch.where(is_active_B[:, None, None], xBC_BC[:, None], conv_ring_BWC.gather(1, present_B1C))
    conv_ring_BWC.scatter_(1, present_B1C, kept_B1C)

    x_BI, B_BS, C_BS = convolved_BC.split([inner, num_groups * num_states, num_groups * num_states], dim=-1)
    groups = (num_groups, num_states)
    y_BHP, after_BHPN = ssd_step(
        ssm_state_BHPN,
        x_BI.unflatten(-1, (num_heads, head_dim)),
        dt_BH,
        A_log_H,
        B_BS.unflatten(-1, groups),
        C_BS.unflatten(-1, groups),
        D_H,
        dt_bias_H,
    )
    ssm_state_BHPN.copy_(torch.where(is_active_B[:, None, None, None], after_BHPN, ssm_state_BHPN))
    return gated_rms_norm(y_BHP.flatten(1), z_BI, norm_weight_I, num_groups, eps)


def attention_step(
    q_BHP: Tensor, k_BGP: Tensor, v_BGP: Tensor, key_BSGP: Tensor, value_BSGP: Tensor, position_B: Tensor, is_active_B: Tensor
) -> Tensor:
    """Attention of one query per sequence over its earlier keys and its own, [B, H, P]; softmax in fp32.

    Args:
        q_BHP: queries; head h reads group h // (H / G).
        k_BGP, v_BGP: this token's, written to the buffers at its position, unless that is beyond them.
        key_BSGP, value_BSGP: buffers of S tokens.
        position_B: int64, tokens before this one.
        is_active_B: bool.
    """
    (batch_size, _, head_dim), num_groups = q_BHP.shape, k_BGP.shape[1]
    # One that is not active reads what is at its position; the result is not looked at.
    position_B = position_B.clamp(max=key_BSGP.shape[1] - 1)
    row_B = torch.arange(batch_size, device=q_BHP.device)
    for buffer_BSGP, new_BGP in ((key_BSGP, k_BGP), (value_BSGP, v_BGP)):
        buffer_BSGP[row_B, position_B] = torch.where(is_active_B[:, None, None], new_BGP, buffer_BSGP[row_B, position_B])
    # Not all of the buffers: on a CPU, whose values are at hand, a step costs what is there, not what there is room for.
    length = int(position_B.max()) + 1 if position_B.device.type == "cpu" else key_BSGP.shape[1]
    q_BGRP = q_BHP.unflatten(1, (num_groups, -1))
    scores_BGRS = torch.einsum("bgrp,bsgp->bgrs", q_BGRP, key_BSGP[:, :length]).float() * head_dim**-0.5
    is_hidden_BS = torch.arange(length, device=q_BHP.device) > position_B[:, None]
    weights_BGRS = scores_BGRS.masked_fill(is_hidden_BS[:, None, None], float("-inf")).softmax(-1).to(v_BGP.dtype)
    return torch.einsum("bgrs,bsgp->bgrp", weights_BGRS, value_BSGP[:, :length]).flatten(1, 2)


TORCH = DecodeOps(norm_linear, linear, mamba_step, attention_step)
"""Runs anywhere."""


def decode_ops_for(device: torch.device) -> DecodeOps:
    """The fastest operations of a decoding step that run on ``device``."""
    if device.type == "cpu":
        return TORCH
    # Only now: Triton comes with the CUDA builds of torch alone.
    from megatron_hybrid.ops.triton.decode_attention import attention_step as fused_attention_step
    from megatron_hybrid.ops.triton.decode_linear import linear as fused_linear, norm_linear as fused_norm_linear
    from megatron_hybrid.ops.triton.decode_mamba import mamba_step as fused_mamba_step

    return DecodeOps(fused_norm_linear, fused_linear, fused_mamba_step, fused_attention_step)
