"""Causal attention by blocks of queries (Dao 2023, "FlashAttention-2", section 3.1, blocks along one axis only).

Each block reads the keys up to its own end and no further, which saves close to half of the work, and the R query heads that share a key head form the rows
of one product. The backward keeps one number per query (the log of the softmax's denominator) and recomputes the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hybrid.ops.attention import causal_mask, check_shapes

LOG2_E = 1.4426950408889634


def attention_blocked(
    q_BLHP: Tensor, k_BSJP: Tensor, v_BSJP: Tensor, *, mask_B1LS: Tensor | None = None, num_queries_per_block: int = 128
) -> Tensor:
    """`attention.attention_reference` as one autograd function. Products run in the dtype of q, the softmax in fp32 (fp64 for fp64)."""
    check_shapes(q_BLHP, k_BSJP)
    return _BlockedAttention.apply(q_BLHP, k_BSJP, v_BSJP, mask_B1LS, num_queries_per_block)


class _BlockedAttention(torch.autograd.Function):
    """In the product batch Z = B J, queries of one block are rows [R L]; scores are in units of log 2, whose exponential is the cheapest."""

    @staticmethod
    def forward(ctx, q_BLHP: Tensor, k_BSJP: Tensor, v_BSJP: Tensor, mask_B1LS: Tensor | None, num_queries_per_block: int) -> Tensor:
        k_ZSP, v_ZSP = _heads_first(k_BSJP), _heads_first(v_BSJP)
        out_BLHP = torch.empty_like(q_BLHP)
        log_totals = []
        for queries in _blocks(q_BLHP.shape[1], num_queries_per_block):
            num_keys = k_BSJP.shape[1] - q_BLHP.shape[1] + queries.stop
            scores_ZQS = _scores(_query_rows(q_BLHP[:, queries], k_ZSP.shape[0]), k_ZSP[:, :num_keys], mask_B1LS, queries)
            maximum_ZQ1 = scores_ZQS.amax(-1, keepdim=True)
            weights_ZQS = scores_ZQS.sub_(maximum_ZQ1).exp2_()
            total_ZQ1 = weights_ZQS.sum(-1, keepdim=True)
            log_totals.append(maximum_ZQ1 + total_ZQ1.log2())
            out_ZQP = (weights_ZQS.to(v_ZSP.dtype) @ v_ZSP[:, :num_keys]) / total_ZQ1
            _as_query_rows(out_BLHP[:, queries], k_ZSP.shape[0]).copy_(out_ZQP.view(*_row_shape(out_BLHP[:, queries], k_BSJP.shape[2])))
        ctx.save_for_backward(q_BLHP, k_BSJP, v_BSJP, mask_B1LS, out_BLHP, *log_totals)
        ctx.num_queries_per_block = num_queries_per_block
        return out_BLHP
