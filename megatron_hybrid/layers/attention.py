"""Grouped-query attention (Ainslie et al. 2023) without position embedding, or with rotary embedding for Transformer baselines;
tensor-parallel over key/value groups."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.layers.linear import NormColumnParallelLinear, ResidualRowParallelLinear
from megatron_hybrid.layers.recompute import recompute_between
from megatron_hybrid.layers.sequence import AttentionCache, Sequence
from megatron_hybrid.layers.specs import Ops


class AttentionLayer(torch.nn.Module):
    """hidden + attention(hidden)."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, ops: Ops, *, recompute_core: bool) -> None:
        super().__init__()
        self.self_attention = SelfAttention(model, config, ops, recompute_core=recompute_core)

    def forward(self, hidden_LBD: Tensor, sequence: Sequence, cache: AttentionCache | None = None) -> Tensor:
        """Map [L or L/tp, B, D] to the same shape; with a cache, read earlier tokens from it and add these."""
        return hidden_LBD + self.self_attention(hidden_LBD, sequence, cache)


class SelfAttention(torch.nn.Module):
    """Attention with the norm before it. Rows of linear_qkv run group by group: the group's queries, its key, its value."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, ops: Ops, *, recompute_core: bool) -> None:
        super().__init__()
        self.ops, self.recompute_core, self.head_dim = ops, recompute_core, model.head_dim
        self.num_groups = model.num_kv_heads // config.tensor_model_parallel_size
        self.num_queries_per_group = model.num_attention_heads // model.num_kv_heads
        width = model.num_attention_heads * model.head_dim
        qkv_width = width + 2 * model.num_kv_heads * model.head_dim
        self.linear_qkv = NormColumnParallelLinear(model.hidden_size, qkv_width, config=config, ops=ops)
        self.linear_proj = ResidualRowParallelLinear(width, model.hidden_size, config=config, ops=ops)

    def forward(self, hidden_LBD: Tensor, sequence: Sequence, cache: AttentionCache | None = None) -> Tensor:
        """Map [L or L/tp, B, D] to the same shape, summed over the tensor ranks."""
        qkv_LBE = self.linear_qkv(hidden_LBD)
        if cache is not None or not (self.recompute_core and self.training):
            return self.linear_proj(self._core(qkv_LBE, sequence, cache))
        return recompute_between(lambda projected: self._core(projected, sequence, None), self.linear_proj, qkv_LBE)

    def _core(self, qkv_LBE: Tensor, sequence: Sequence, cache: AttentionCache | None) -> Tensor:
        """Attention proper: [L, B, linear_qkv rows] to [L, B, heads x head_dim]."""
        q_BLHP, k_BLGP, v_BLGP = self.split_heads(qkv_LBE.transpose(0, 1))
        if sequence.rope_cos_sin is not None:
            q_BLHP, k_BLGP = (self.ops.apply_rope(tensor, *sequence.rope_cos_sin) for tensor in (q_BLHP, k_BLGP))
        if cache is not None:
            k_BLGP, v_BLGP = cache.extend(k_BLGP, v_BLGP, sequence.offset)
        attended_BLHP = self.ops.attention(q_BLHP, k_BLGP, v_BLGP, mask_B1LS=sequence.attention_mask_B1LS)
        return attended_BLHP.flatten(2).transpose(0, 1)

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., H, P], keys and values [..., G, P] in rows of linear_qkv [..., E]."""
        qkv = qkv.unflatten(-1, (self.num_groups, self.num_queries_per_group + 2, self.head_dim))
        q, k, v = qkv.split([self.num_queries_per_group, 1, 1], dim=-2)
        return q.flatten(-3, -2), k.squeeze(-2), v.squeeze(-2)

    def new_cache(self, batch_size: int, max_length: int) -> AttentionCache:
        """Buffers for ``max_length`` tokens, of zeros: what a mask hides is multiplied by 0, which NaN would survive."""
        weight = self.linear_qkv.weight
        shape = (batch_size, max_length, self.num_groups, self.head_dim)
        return AttentionCache(weight.new_zeros(shape), weight.new_zeros(shape))
