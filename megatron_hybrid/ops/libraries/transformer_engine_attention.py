"""Causal attention by Transformer Engine, which takes flash-attn where it is installed, and cuDNN's kernels otherwise.

Unlike torch, it can ask cuDNN for a backward that adds in a fixed order (``layers.specs``, docs/kernels.md).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from transformer_engine.pytorch import DotProductAttention

from megatron_hybrid.ops.attention import attention_sdpa, check_shapes


def attention(q_BLHP: Tensor, k_BSJP: Tensor, v_BSJP: Tensor, *, mask_B1LS: Tensor | None = None) -> Tensor:
    """`attention_reference` on a GPU in 16 bits; queries that are fewer than their keys, as in decoding, go to `attention_sdpa`.

    Raises ValueError: there is a mask, for which Transformer Engine would form the whole matrix of scores.
    """
    check_shapes(q_BLHP, k_BSJP)
    if mask_B1LS is not None:
        raise ValueError(
            "Transformer Engine's attention takes no mask that keeps documents apart; set data.reset_at_documents=false, "
            "or kernels.attention to auto or sdpa"
        )
    if q_BLHP.shape[1] != k_BSJP.shape[1]:
        return attention_sdpa(q_BLHP, k_BSJP, v_BSJP)
    core = _core(q_BLHP.shape[2], k_BSJP.shape[2], q_BLHP.shape[3], torch.are_deterministic_algorithms_enabled())
    return core(q_BLHP, k_BSJP, v_BSJP).unflatten(-1, q_BLHP.shape[2:])


@cache
def _core(num_heads: int, num_key_heads: int, head_dim: int, deterministic: bool) -> DotProductAttention:
    """Holds no parameters: one serves all layers. It asks torch whether to be deterministic when it is made."""
    core = DotProductAttention(num_heads, head_dim, num_gqa_groups=num_key_heads, qkv_format="bshd", attn_mask_type="causal")
    assert core.deterministic or not deterministic
    return core
