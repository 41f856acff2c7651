"""Calls of every operation that has Triton kernels, at sizes of the models in all but the number of tokens, for `compile_kernels.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_hybrid.fp8 import kernels as fp8
from megatron_hybrid.fp8.formats import E4M3, E5M2
from megatron_hybrid.ops.triton.activation import squared_relu
from megatron_hybrid.ops.triton.conv1d import causal_conv1d
from megatron_hybrid.ops.triton.cross_entropy import _gradient_kernel, _statistics_kernel, linear_cross_entropy
from megatron_hybrid.ops.triton.decode_attention import attention_step
from megatron_hybrid.ops.triton.decode_linear import linear, norm_linear, rms_norm as decode_rms_norm
from megatron_hybrid.ops.triton.decode_mamba import mamba_step
from megatron_hybrid.ops.triton.distillation import linear_kl_divergence
from megatron_hybrid.ops.triton.embedding import embedding
from megatron_hybrid.ops.triton.mamba_core import mamba_core
from megatron_hybrid.ops.triton.norm import gated_rms_norm, rms_norm
from megatron_hybrid.ops.triton.ssd import ssd
from megatron_hybrid.train.adamw import RemainderAdamW

HIDDEN, VOCABULARY = 4096, 131072
"""Of the 8B."""


def call_mamba_core(dtype: torch.dtype, heads: int, head_dim: int, groups: int, state: int) -> None:
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state
    tensors = [torch.zeros(256, 1, inner + channels + heads), torch.zeros(channels, 4), torch.zeros(channels), torch.zeros(inner)]
    projection, taps, bias, norm_weight = (tensor.to(dtype).requires_grad_() for tensor in tensors)
    per_head = [torch.zeros(heads, requires_grad=True) for _ in range(3)]
    documents = torch.zeros(1, 256, dtype=torch.int64)
    mamba_core(projection, taps, bias, *per_head, norm_weight, num_groups=groups, eps=1e-5, segment_ids_BL=documents).sum().backward()


def call_ssd(dtype: torch.dtype) -> None:
    """With the states at both ends, which the core has not."""
    x_BLHP, B_BLGN, C_BLGN = (torch.zeros(1, 128, *shape, dtype=dtype, requires_grad=True) for shape in ((8, 64), (1, 128), (1, 128)))
    per_head = [torch.zeros(8, requires_grad=True) for _ in range(3)]
    dt_BLH, initial_BHPN = torch.zeros(1, 128, 8, dtype=dtype), torch.zeros(1, 8, 64, 128, requires_grad=True)
    y_BLHP, final_BHPN = ssd(x_BLHP, dt_BLH, per_head[0], B_BLGN, C_BLGN, *per_head[1:], initial_state_BHPN=initial_BHPN)
    (y_BLHP.sum() + final_BHPN.sum()).backward()


def call_conv1d(dtype: torch.dtype) -> None:
    x_BLC, weight_CW = _leaf(dtype, 1, 128, 10240), _leaf(dtype, 10240, 4)
    initial_BTC = _leaf(dtype, 1, 3, 10240)
    for documents_BL, initial_state_BTC in ((torch.zeros(1, 128, dtype=torch.int64), None), (None, initial_BTC)):
        y_BLC, _ = causal_conv1d(x_BLC, weight_CW, None, segment_ids_BL=documents_BL, initial_state_BTC=initial_state_BTC)
        y_BLC.sum().backward()


def call_norms(dtype: torch.dtype) -> None:
    rms_norm(_leaf(dtype, 16, 1, HIDDEN), _leaf(dtype, HIDDEN), 1e-5).sum().backward()
    gated_rms_norm(_leaf(dtype, 16, 1, 8192), _leaf(dtype, 16, 1, 8192), _leaf(dtype, 8192), 8, 1e-5).sum().backward()


def call_row_sum(dtype: torch.dtype) -> None:
    """Through the norm, whose weight's gradient is in parts."""
    weight = torch.nn.Parameter(torch.zeros(HIDDEN, dtype=dtype))
    weight.main_grad = torch.zeros(HIDDEN)
    rms_norm(_leaf(dtype, 16, 1, HIDDEN), weight, 1e-5).sum().backward()


def call_squared_relu(dtype: torch.dtype) -> None:
    squared_relu(_leaf(dtype, 16, HIDDEN)).sum().backward()


def call_embedding(dtype: torch.dtype) -> None:
    embedding(_leaf(dtype, 1024, HIDDEN), torch.zeros(1, 16, dtype=torch.int64), 0).sum().backward()


def call_cross_entropy(dtype: torch.dtype) -> None:
    """With the whole vocabulary; and with a divided one, whose kernels are called alone because they need several ranks."""
    hidden, weight_VD, labels = _leaf(dtype, 16, 1, 16), _leaf(dtype, VOCABULARY, 16), torch.zeros(16, 1, dtype=torch.int64)
    linear_cross_entropy(hidden, weight_VD, labels, torch.ones(16, 1), vocab_size=VOCABULARY)
    logits_NV, one_N, constants = torch.zeros(16, 16384, dtype=dtype), torch.zeros(16), {"LOG2_E": 1.5, "BLOCK_V": 8192, "num_warps": 16}
    _statistics_kernel[(16,)](logits_NV, labels, torch.zeros(3, 16), 16384, 16384, 16384, 16, **constants)
    _gradient_kernel[(16,)](logits_NV, labels, one_N, one_N, 16384, 16384, 16384, 16384, **constants)


def call_distillation(dtype: torch.dtype) -> None:
    weight_VD, other_VD = _leaf(dtype, VOCABULARY, 16), _leaf(dtype, VOCABULARY, 16)
    linear_kl_divergence(
        _leaf(dtype, 16, 1, 16), weight_VD, _leaf(dtype, 16, 1, 16), other_VD, torch.ones(16, 1), vocab_size=VOCABULARY, temperature=2.0
    )


def call_fp8(dtype: torch.dtype) -> None:
    """Every cast that a linear or an MLP asks for."""
    x_MK, amax = torch.zeros(128, HIDDEN, dtype=dtype), torch.zeros(())
    fp8.amax(x_MK)
    for to, prologue in ((E4M3, "none"), (E4M3, "squared_relu"), (E5M2, "none"), (E5M2, "squared_relu_backward")):
        fp8.scales(amax, to)
        fp8.amax(x_MK, prologue=prologue, other_MK=x_MK)
        fp8.cast(x_MK, amax, to, amax=amax, prologue=prologue, other_MK=x_MK)
    fp8.cast(x_MK, amax, E4M3, columns=False)


def call_adamw(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.zeros(HIDDEN, dtype=dtype))
    weight.decoupled_grad = torch.zeros(HIDDEN)
    RemainderAdamW([{"params": [weight], "lr": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}]).step()


def call_decode_linear(dtype: torch.dtype) -> None:
    """One sequence and several, each with all that is fused; and more than are fused."""
    weight_OD, norm_weight_D = torch.zeros(HIDDEN, HIDDEN, dtype=dtype), torch.zeros(HIDDEN, dtype=dtype)
    for batch in (1, 8):
        x_BD = torch.zeros(batch, HIDDEN, dtype=dtype)
        norm_linear(x_BD, norm_weight_D, weight_OD, 1e-5, squared_relu=True)
        linear(x_BD, weight_OD, x_BD)
    decode_rms_norm(torch.zeros(32, HIDDEN, dtype=dtype), norm_weight_D, 1e-5)


def call_decode_attention(dtype: torch.dtype) -> None:
    q_BHP, k_BGP, key_BSGP = (torch.zeros(2, *shape, dtype=dtype) for shape in ((32, 128), (8, 128), (8192, 8, 128)))
    attention_step(q_BHP, k_BGP, k_BGP, key_BSGP, key_BSGP, torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool))


def call_decode_mamba(dtype: torch.dtype) -> None:
    heads, head_dim, groups, states, taps = 128, 64, 8, 128, 4
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * states
    A_log_H, D_H, dt_bias_H = torch.zeros(3, heads)
    mamba_step(
        torch.zeros(2, inner + channels + heads, dtype=dtype),
        torch.zeros(2, taps, channels, dtype=dtype),
        torch.zeros(2, heads, head_dim, states),
        torch.zeros(2, dtype=torch.int64),
        torch.ones(2, dtype=torch.bool),
        conv_weight_CW=torch.zeros(channels, taps, dtype=dtype),
        conv_bias_C=torch.zeros(channels, dtype=dtype),
        A_log_H=A_log_H,
        D_H=D_H,
        dt_bias_H=dt_bias_H,
        norm_weight_I=torch.zeros(inner, dtype=dtype),
        num_groups=groups,
        eps=1e-5,
    )


CALLS: dict[str, Callable[..., None]] = {
    "mamba_core": call_mamba_core,
    "ssd": call_ssd,
    "conv1d": call_conv1d,
    "norms": call_norms,
    "row_sum": call_row_sum,
    "squared_relu": call_squared_relu,
    "embedding": call_embedding,
    "cross_entropy": call_cross_entropy,
    "distillation": call_distillation,
    "fp8": call_fp8,
    "adamw": call_adamw,
    "decode_linear": call_decode_linear,
    "decode_attention": call_decode_attention,
    "decode_mamba": call_decode_mamba,
}


def _leaf(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)
