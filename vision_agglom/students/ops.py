"""The operations inside the student's layers, chosen per host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.ops.registry import select


@dataclass(frozen=True)
class VisionOps:
    """Functions that layers call without asking which host they are on."""

    linear: Callable[[Tensor, Tensor], Tensor]
    """x [..., I], weight [O, I] -> [..., O]."""
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """x [..., D], weight [D], bias [D], eps -> x's shape and dtype."""
    attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    """q, k, v [B, L, H, P] -> [B, L, H, P]; every query sees every key."""


def vision_ops(device: torch.device) -> VisionOps:
    """The fastest implementations on ``device``."""
    linear = select("linear", "cpu") if device.type == "cpu" else F.linear
    return VisionOps(linear=linear, layer_norm=layer_norm, attention=attention)


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis with statistics in fp32."""
    return F.layer_norm(x, weight_D.shape, weight_D, bias_D, eps)


def attention(q_BLHP: Tensor, k_BSHP: Tensor, v_BSHP: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(P)) v over all keys, through torch's kernel for the device."""
    out_BHLP = F.scaled_dot_product_attention(q_BLHP.transpose(1, 2), k_BSHP.transpose(1, 2), v_BSHP.transpose(1, 2))
    return out_BHLP.transpose(1, 2)
