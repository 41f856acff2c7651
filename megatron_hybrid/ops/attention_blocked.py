"""Causal attention by blocks of queries (Dao 2023, "FlashAttention-2", section 3.1, with blocks along the queries only).

Each block reads the keys up to its own end and no further, which saves close to half of the work, and the R query heads that share a key
head form the rows of one product. The backward keeps one number per query, log of the softmax's denominator, and recomputes the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_hybrid.ops.attention import causal_mask, check_shapes

LOG2_E = 1.4426950408889634


def attention_blocked(
    q_BLHP: Tensor, k_BSJP: Tensor, v_BSJP: Tensor, *, mask_B1LS: Tensor | None = None, num_queries_per_block: int = 64
) -> Tensor:
    """`attention.attention_reference` as one autograd function. Products run in the dtype of q, the softmax in fp32 (fp64 for fp64)."""
    check_shapes(q_BLHP, k_BSJP)
    return _BlockedAttention.apply(q_BLHP, k_BSJP, v_BSJP, mask_B1LS, num_queries_per_block)


class _BlockedAttention(torch.autograd.Function):
    """Z = B J is the batch of the products, Q = R l the rows of a block of l queries. Scores are in units of log 2: exp2 is cheapest."""

    @staticmethod
    def forward(ctx, q_BLHP: Tensor, k_BSJP: Tensor, v_BSJP: Tensor, mask_B1LS: Tensor | None, num_queries_per_block: int) -> Tensor:
        k_ZSP, v_ZSP = _heads_first(k_BSJP), _heads_first(v_BSJP)
        out_BLHP = torch.empty_like(q_BLHP)
        log_totals = []
        for block, num_keys in _blocks(q_BLHP.shape[1], k_BSJP.shape[1], num_queries_per_block):
            q_ZQP = _rows(q_BLHP[:, block], k_BSJP.shape[2])
            scores_ZQS = _scores(q_ZQP, k_ZSP[:, :num_keys], mask_B1LS, block, q_BLHP.shape[0])
            maximum_ZQ1 = scores_ZQS.amax(-1, keepdim=True)
            weights_ZQS = scores_ZQS.sub_(maximum_ZQ1).exp2_()
            total_ZQ1 = weights_ZQS.sum(-1, keepdim=True)
            log_totals.append(maximum_ZQ1 + total_ZQ1.log2())
            _write_rows(out_BLHP[:, block], k_BSJP.shape[2], (weights_ZQS.to(v_ZSP.dtype) @ v_ZSP[:, :num_keys]) / total_ZQ1)
        ctx.save_for_backward(q_BLHP, k_BSJP, v_BSJP, mask_B1LS, out_BLHP, *log_totals)
        ctx.num_queries_per_block = num_queries_per_block
        return out_BLHP

    @staticmethod
    def backward(ctx, dout_BLHP: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_BLHP, k_BSJP, v_BSJP, mask_B1LS, out_BLHP, *log_totals = ctx.saved_tensors
        num_key_heads, dtype = k_BSJP.shape[2], q_BLHP.dtype
        k_ZSP, v_ZSP = _heads_first(k_BSJP), _heads_first(v_BSJP)
        dq_BLHP = torch.empty_like(q_BLHP)
        dk_ZSP, dv_ZSP = (torch.zeros_like(t, dtype=log_totals[0].dtype) for t in (k_ZSP, v_ZSP))
        blocks = _blocks(q_BLHP.shape[1], k_BSJP.shape[1], ctx.num_queries_per_block)
        for (block, num_keys), log_total_ZQ1 in zip(blocks, log_totals, strict=True):
            q_ZQP, out_ZQP, dout_ZQP = (_rows(t[:, block], num_key_heads) for t in (q_BLHP, out_BLHP, dout_BLHP))
            scores_ZQS = _scores(q_ZQP, k_ZSP[:, :num_keys], mask_B1LS, block, q_BLHP.shape[0])
            weights_ZQS = scores_ZQS.sub_(log_total_ZQ1).exp2_()
            dv_ZSP[:, :num_keys] += weights_ZQS.to(dtype).mT @ dout_ZQP
            # the softmax's own gradient: weights * (dweights - <dout, out>)
            mean_ZQ1 = (dout_ZQP * out_ZQP).sum(-1, keepdim=True, dtype=log_total_ZQ1.dtype)
            dscores_ZQS = (dout_ZQP @ v_ZSP[:, :num_keys].mT).to(log_total_ZQ1.dtype).sub_(mean_ZQ1)
            dscores_ZQS = dscores_ZQS.mul_(weights_ZQS).mul_(q_BLHP.shape[-1] ** -0.5).to(dtype)
            _write_rows(dq_BLHP[:, block], num_key_heads, dscores_ZQS @ k_ZSP[:, :num_keys])
            dk_ZSP[:, :num_keys] += dscores_ZQS.mT @ q_ZQP
        dk_BSJP, dv_BSJP = (t.unflatten(0, (-1, num_key_heads)).transpose(1, 2).to(dtype) for t in (dk_ZSP, dv_ZSP))
        return dq_BLHP, dk_BSJP, dv_BSJP, None, None


def _blocks(num_queries: int, num_keys: int, num_queries_per_block: int) -> Iterator[tuple[slice, int]]:
    """Each block of queries, and how many keys its last query may read."""
    for start in range(0, num_queries, num_queries_per_block):
        end = min(start + num_queries_per_block, num_queries)
        yield slice(start, end), num_keys - num_queries + end


def _scores(q_ZQP: Tensor, k_ZSP: Tensor, mask_B1LS: Tensor | None, block: slice, batch: int) -> Tensor:
    """Scaled scores of a block [Z, Q, S], -inf where a query may not read; fp32 or wider."""
    scores_ZQS = (q_ZQP @ k_ZSP.mT).to(torch.promote_types(q_ZQP.dtype, torch.float32)).mul_(LOG2_E * q_ZQP.shape[-1] ** -0.5)
    num_queries, num_keys = block.stop - block.start, k_ZSP.shape[1]
    if mask_B1LS is not None:
        readable_BJRls = mask_B1LS[:, :, None, block, :num_keys]
        scores_ZQS.view(batch, -1, scores_ZQS.shape[1] // num_queries, num_queries, num_keys).add_(_exclusion(readable_BJRls, scores_ZQS))
    else:
        readable_ll = causal_mask(num_queries, num_queries, q_ZQP.device)
        scores_ZQS.unflatten(1, (-1, num_queries))[..., num_keys - num_queries :].add_(_exclusion(readable_ll, scores_ZQS))
    return scores_ZQS


def _exclusion(readable: Tensor, like: Tensor) -> Tensor:
    """0 where True, -inf elsewhere: adding it is several times faster than filling under a mask."""
    return torch.zeros(readable.shape, dtype=like.dtype, device=like.device).masked_fill_(~readable, float("-inf"))


def _heads_first(t_BSJP: Tensor) -> Tensor:
    """[B, S, J, P] -> [Z, S, P] contiguous."""
    return t_BSJP.transpose(1, 2).flatten(0, 1).contiguous()


def _row_view(t_BLHP: Tensor, num_key_heads: int) -> Tensor:
    """[B, l, H, P] -> [B, J, R, l, P], a view."""
    return t_BLHP.unflatten(2, (num_key_heads, -1)).permute(0, 2, 3, 1, 4)


def _rows(t_BLHP: Tensor, num_key_heads: int) -> Tensor:
    """[B, l, H, P] -> [Z, Q, P] contiguous."""
    return _row_view(t_BLHP, num_key_heads).contiguous().flatten(2, 3).flatten(0, 1)


def _write_rows(t_BLHP: Tensor, num_key_heads: int, rows_ZQP: Tensor) -> None:
    """Inverse of `_rows`, into `t_BLHP`."""
    view = _row_view(t_BLHP, num_key_heads)
    view.copy_(rows_ZQP.view(view.shape))
