"""The operations inside the student's layers, chosen per host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_hybrid.layers.specs import choose_implementations
from megatron_hybrid.ops.registry import select
from vision_agglom.students.biased_linear import biased_linear


@dataclass(frozen=True)
class VisionOps:
    """Functions that layers call without asking which host they are on."""

    linear: Callable[[Tensor, Tensor], Tensor]
    """x [..., I], weight [O, I] -> [..., O]."""
    biased_linear: Callable[[Tensor, Tensor, Tensor], Tensor]
    """x [..., I], weight [O, I], bias [O] -> [..., O]."""
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """x [..., D], weight [D], bias [D], eps -> x's shape and dtype."""
    attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    """q, k, v [B, L, H, P] -> [B, L, H, P]; every query sees every key."""


def vision_ops(device: torch.device, dtype: torch.dtype) -> VisionOps:
    """The fastest implementations on ``device`` for a student that works in ``dtype``."""
    chosen = choose_implementations(device, dtype)
    linear = select("linear", chosen["linear"])
    return VisionOps(
        linear=linear,
        biased_linear=(lambda x, weight_OI, bias_O: linear(x, weight_OI) + bias_O) if device.type == "cpu" else biased_linear,
        layer_norm=layer_norm,
        attention=attention_cudnn if chosen["attention"] == "cudnn" else attention,
    )


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis with statistics in fp32."""
    return F.layer_norm(x, weight_D.shape, weight_D, bias_D, eps)


def attention(q_BLHP: Tensor, k_BSHP: Tensor, v_BSHP: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(P)) v over all keys, through torch's kernel for the device."""
    out_BHLP = F.scaled_dot_product_attention(q_BLHP.transpose(1, 2), k_BSHP.transpose(1, 2), v_BSHP.transpose(1, 2))
    return out_BHLP.transpose(1, 2)


def attention_cudnn(q_BLHP: Tensor, k_BSHP: Tensor, v_BSHP: Tensor) -> Tensor:
    """``attention`` by cuDNN's kernels for Hopper and later; by torch's choice where these do not take the shape."""
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
        return attention(q_BLHP, k_BSHP, v_BSHP)
