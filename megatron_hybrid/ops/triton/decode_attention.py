"""``ops.decode.attention_step``: one query per sequence over its cache, split along the keys (Dao et al. 2023, "Flash-Decoding").

The grid does not depend on how long the sequences are, so that a CUDA graph fits all lengths: each sequence's keys are cut into as many
parts as there are programs for them. The queries that share a key head are the rows of one product, so keys and values are read once.
This token's own key and value are in registers, where the first part starts from them; it also writes them to the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ENOUGH_PROGRAMS = 528
"""Four for each multiprocessor of a large GPU."""
_MAX_PARTS = 64
_BLOCK_S = 64
"""Keys that a program looks at together."""
_DOT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
"""What products are made in; the interpreter's numpy has no bf16 ones."""


def attention_step(
    q_BHP: Tensor, k_BGP: Tensor, v_BGP: Tensor, key_BSGP: Tensor, value_BSGP: Tensor, position_B: Tensor, is_active_B: Tensor
) -> Tensor:
    """``ops.decode.attention_step``. What a sequence that is not active gets back is undefined."""
    (batch, num_heads, head_dim), num_groups, max_length = q_BHP.shape, k_BGP.shape[1], key_BSGP.shape[1]
    assert key_BSGP.is_contiguous() and value_BSGP.is_contiguous() and k_BGP.stride() == v_BGP.stride() and k_BGP.stride(2) == 1
    q_BHP = q_BHP.contiguous()
    num_parts = min(_MAX_PARTS, triton.cdiv(_ENOUGH_PROGRAMS, batch * num_groups), triton.cdiv(max_length, _BLOCK_S))
    out_BHP = torch.empty_like(q_BHP)
    # Each part's softmax-weighted values, its largest score and its sum of weights.
    part_BHKP = q_BHP.new_empty(batch, num_heads, num_parts, head_dim, dtype=torch.float32)
    extent_BHK2 = q_BHP.new_empty(batch, num_heads, num_parts, 2, dtype=torch.float32)
    _part_kernel[(batch, num_groups, num_parts)](
        q_BHP,
        k_BGP,
        v_BGP,
        key_BSGP,
        value_BSGP,
        position_B,
        is_active_B,
        part_BHKP,
        extent_BHK2,
        k_BGP.stride(0),
        k_BGP.stride(1),
        max_length,
        num_parts,
        head_dim**-0.5,
        num_groups=num_groups,
        queries_per_group=num_heads // num_groups,
        head_dim=head_dim,
        BLOCK_R=max(16, triton.next_power_of_2(num_heads // num_groups)),
        BLOCK_P=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_S=_BLOCK_S,
        DOT_DTYPE=_DOT_DTYPES[torch.float32 if triton.knobs.runtime.interpret else q_BHP.dtype],
        num_warps=4,
        num_stages=3,
    )
    _join_kernel[(batch, num_heads)](
        part_BHKP,
        extent_BHK2,
        out_BHP,
        num_parts,
        head_dim=head_dim,
        BLOCK_K=triton.next_power_of_2(num_parts),
        BLOCK_P=triton.next_power_of_2(head_dim),
        num_warps=4,
    )
    return out_BHP


@triton.jit
def _part_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_ptr,
    value_ptr,
    position_ptr,
    is_active_ptr,
    part_ptr,
    extent_ptr,
    new_stride_b,
    new_stride_g,
    max_length,
    num_parts,
    scale,
    num_groups: tl.constexpr,
    queries_per_group: tl.constexpr,
    head_dim: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    sequence, group, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if tl.load(is_active_ptr + sequence) == 0:
        return
    length = tl.load(position_ptr + sequence).to(tl.int32)
    r, p, s = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_S)
    has_r, has_p = r < queries_per_group, p < head_dim
    head = group * queries_per_group + r
    num_heads: tl.constexpr = num_groups * queries_per_group
    has_rp = has_r[:, None] & has_p[None, :]
    q_RP = tl.load(q_ptr + (sequence * num_heads + head[:, None]) * head_dim + p[None, :], mask=has_rp, other=0.0)

    maximum_R = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
    total_R = tl.zeros((BLOCK_R,), dtype=tl.float32)
    sum_RP = tl.zeros((BLOCK_R, BLOCK_P), dtype=tl.float32)
    row_stride: tl.constexpr = num_groups * head_dim
    cache_offset = (sequence * max_length * num_groups + group) * head_dim
    if part == 0:
        new_offset = sequence * new_stride_b + group * new_stride_g + p
        k_P = tl.load(k_ptr + new_offset, mask=has_p, other=0.0)
        v_P = tl.load(v_ptr + new_offset, mask=has_p, other=0.0)
        place = cache_offset + length * row_stride + p
        tl.store(key_ptr + place, k_P, mask=has_p & (length < max_length))
        tl.store(value_ptr + place, v_P, mask=has_p & (length < max_length))
        maximum_R = tl.sum(q_RP.to(tl.float32) * k_P.to(tl.float32)[None, :], axis=1) * scale
        total_R += 1.0
        sum_RP += v_P.to(tl.float32)[None, :]

    # Whole blocks to each part, so that only the last one has a ragged end.
    blocks_per_part = tl.cdiv(tl.cdiv(length, BLOCK_S), num_parts)
    first = part * blocks_per_part * BLOCK_S
    end = tl.minimum(first + blocks_per_part * BLOCK_S, length)
    for start in range(first, end, BLOCK_S):
        has_s = start + s < end
        place_S = cache_offset + (start + s) * row_stride
        k_PS = tl.load(key_ptr + place_S[None, :] + p[:, None], mask=has_s[None, :] & has_p[:, None], other=0.0)
        scores_RS = tl.dot(q_RP.to(DOT_DTYPE), k_PS.to(DOT_DTYPE), input_precision="ieee") * scale
        scores_RS = tl.where(has_s[None, :], scores_RS, float("-inf"))
        higher_R = tl.maximum(maximum_R, tl.max(scores_RS, axis=1))
        weights_RS = tl.exp(scores_RS - higher_R[:, None])
        shrink_R = tl.exp(maximum_R - higher_R)
        total_R = total_R * shrink_R + tl.sum(weights_RS, axis=1)
        v_SP = tl.load(value_ptr + place_S[:, None] + p[None, :], mask=has_s[:, None] & has_p[None, :], other=0.0)
        sum_RP = sum_RP * shrink_R[:, None] + tl.dot(weights_RS.to(DOT_DTYPE), v_SP.to(DOT_DTYPE), input_precision="ieee")
        maximum_R = higher_R

    part_R = (sequence * num_heads + head) * num_parts + part
    tl.store(part_ptr + part_R[:, None] * head_dim + p[None, :], sum_RP, mask=has_rp)
    tl.store(extent_ptr + part_R * 2, maximum_R, mask=has_r)
    tl.store(extent_ptr + part_R * 2 + 1, total_R, mask=has_r)


@triton.jit
def _join_kernel(part_ptr, extent_ptr, out_ptr, num_parts, head_dim: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr):
    head = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    k, p = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_P)
    has_k, has_p = k < num_parts, p < head_dim
    maximum_K = tl.load(extent_ptr + (head * num_parts + k) * 2, mask=has_k, other=float("-inf"))
    total_K = tl.load(extent_ptr + (head * num_parts + k) * 2 + 1, mask=has_k, other=0.0)
    # The first part is never empty, so the maximum is finite.
    shrink_K = tl.exp(maximum_K - tl.max(maximum_K, axis=0))
    part_KP = tl.load(part_ptr + (head * num_parts + k[:, None]) * head_dim + p[None, :], mask=has_k[:, None] & has_p[None, :], other=0.0)
    out_P = tl.sum(part_KP * shrink_K[:, None], axis=0) / tl.sum(total_K * shrink_K, axis=0)
    tl.store(out_ptr + head * head_dim + p, out_P.to(out_ptr.dtype.element_ty), mask=has_p)
