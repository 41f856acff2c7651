"""Kernels of the chunked Mamba-2 scan; `ssd_chunked.py` derives the mathematics, `ssd.py` here puts the kernels together.

Shapes: B batch, S chunks of K positions, H heads, G groups, P head dim, N state. Sequence tensors come with strides for batch, position and
head or group, and a dense last axis. Per chunk and head stand, fp32 and dense, the vectors over the chunk's positions

    target  [B, S, H, K]   c_l: log2 of the decay from the chunk's start, or the document's where that is later, through position l
    source  [B, S, H, K]   c_s - log2 dt_s, so that 2^(target_l - source_s) is the weight of source s at target l
    into    [B, S, H, K]   weight of source s in the state at the chunk's end; 0 if its document ends before
    out     [B, S, H, K]   weight of the state in front of the chunk at target l; 0 if its document ended before
    total   [B, S, H]      decay from the state in front of the chunk to the one behind it

Every exponent is at most log2 dt, and what a mask removes gets exponent -inf before 2^x is taken.
Positions beyond the sequence have dt = 0: their source is +inf and nothing comes from them.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# below this exponent 2^x is zero in fp32: bounding steps there changes no result, and keeps differences of sums precise
LOWEST_EXPONENT = tl.constexpr(-150.0)


@triton.jit
def softplus(v):
    """max(v, 0) + log(1 + u), u = exp(-|v|): the logarithm as its area-tangent series in u / (2 + u) <= 1/3, precise for small u too."""
    u = tl.exp(-tl.abs(v))
    s = u / (2.0 + u)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(v, 0.0) + 2.0 * s * series


@triton.jit
def load_documents(document_ptr, batch, length, position):
    """Document numbers; positions before the sequence are in document 0, positions behind it in the last one."""
    inside = tl.minimum(tl.maximum(position, 0), length - 1)
    document = tl.load(document_ptr + batch.to(tl.int64) * length + inside)
    return tl.where(position < 0, 0, document)


@triton.jit
def _add_unless_restart(earlier, earlier_restarts, later, later_restarts):
    return tl.where(later_restarts != 0, later, earlier + later), earlier_restarts | later_restarts


@triton.jit
def sum_since_restart(values, restarts, reverse: tl.constexpr):
    """Running sums along axis 0 that start anew where `restarts` [K]: what lies beyond a restart does not even enter the rounding."""
    flags = restarts.to(tl.int32)[:, None] + tl.zeros_like(values).to(tl.int32)
    sums, _ = tl.associative_scan((values, flags), 0, _add_unless_restart, reverse=reverse)
    return sums


@triton.jit(do_not_specialize=["length", "num_chunks"])
def decay_kernel(
    dt_raw_ptr,
    A_log_ptr,
    dt_bias_ptr,
    document_ptr,
    target_ptr,
    source_ptr,
    into_ptr,
    out_ptr,
    total_ptr,
    length,
    num_chunks,
    num_heads,
    dt_stride_b,
    dt_stride_l,
    HAS_DOCUMENTS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The vectors above from dt. Grid (B S, blocks of heads)."""
    batch, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    k = tl.arange(0, K)
    position = chunk * K + k
    is_head, inside = head < num_heads, position < length

    rows = batch.to(tl.int64) * dt_stride_b + position.to(tl.int64) * dt_stride_l
    mask = inside[:, None] & is_head[None, :]
    raw = tl.load(dt_raw_ptr + rows[:, None] + head[None, :], mask=mask, other=0.0).to(tl.float32)
    dt = softplus(raw + tl.load(dt_bias_ptr + head, mask=is_head, other=0.0).to(tl.float32)[None, :])
    A = -tl.exp(tl.load(A_log_ptr + head, mask=is_head, other=0.0).to(tl.float32))
    step = tl.where(inside[:, None], tl.maximum(dt * (A * LOG2_E)[None, :], LOWEST_EXPONENT), 0.0)

    if HAS_DOCUMENTS:
        document = load_documents(document_ptr, batch, length, position)
        before = load_documents(document_ptr, batch, length, chunk * K - 1)
        last = load_documents(document_ptr, batch, length, chunk * K + K - 1)
        restarts = document != load_documents(document_ptr, batch, length, position - 1)
        target = sum_since_restart(step, restarts, reverse=False)
    else:
        target = tl.cumsum(step, axis=0)
    end = tl.sum(tl.where((k == K - 1)[:, None], target, 0.0), axis=0)
    source = tl.where(inside[:, None], target - tl.log2(dt), float("inf"))
    into, out, total = tl.exp2(end[None, :] - source), tl.exp2(target), tl.exp2(end)
    if HAS_DOCUMENTS:
        into = tl.where((document == last)[:, None], into, 0.0)
        out = tl.where((document == before)[:, None], out, 0.0)
        total = tl.where(last == before, total, 0.0)

    row = (tl.program_id(0) * num_heads + head).to(tl.int64)
    offsets = row[None, :] * K + k[:, None]
    columns = is_head[None, :] & (k >= 0)[:, None]
    tl.store(target_ptr + offsets, target, mask=columns)
    tl.store(source_ptr + offsets, source, mask=columns)
    tl.store(into_ptr + offsets, into, mask=columns)
    tl.store(out_ptr + offsets, out, mask=columns)
    tl.store(total_ptr + row, total, mask=is_head)


@triton.jit(do_not_specialize=["length", "num_chunks"])
def state_walk_kernel(
    value_ptr,
    key_ptr,
    weight_ptr,
    total_ptr,
    initial_ptr,
    states_ptr,
    final_ptr,
    other_states_ptr,
    across_ptr,
    length,
    num_chunks,
    num_heads,
    num_heads_per_group,
    value_stride_b,
    value_stride_l,
    value_stride_h,
    key_stride_b,
    key_stride_l,
    key_stride_g,
    HAS_INITIAL: tl.constexpr,
    REVERSE: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """state <- total_c state + sum_k weight_k value_k key_k^T over the chunks in order, with the state in registers.

    Grid (parts of the state, H, B). Writes the state in front of each chunk to states [B, S, H, P, N], and the last one, fp32, to final
    [B, H, P, N]. Forward: value x, key B, weight into. With REVERSE the chunks run backwards, and value dy, key C, weight out give the
    gradient of the state behind each chunk, and finally of the initial state. Given the forward states too (other_states), it writes what
    goes from the state in front of a chunk to the one behind it, total_c <state, gradient>, to across [B, S, H, parts BLOCK_P], by rows
    of the parts.
    """
    num_parts_n = tl.cdiv(N, BLOCK_N)
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p = (part // num_parts_n) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (part % num_parts_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, K)
    is_p, is_n = p < P, n < N
    cells = p[:, None] * N + n[None, :]
    is_cell = is_p[:, None] & is_n[None, :]

    value_ptr += batch * value_stride_b + head * value_stride_h
    key_ptr += batch * key_stride_b + (head // num_heads_per_group) * key_stride_g
    if HAS_INITIAL:
        state = tl.load(initial_ptr + (batch * num_heads + head) * (P * N) + cells, mask=is_cell, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)

    for i in range(num_chunks):
        chunk = num_chunks - 1 - i if REVERSE else i
        row = (batch * num_chunks + chunk) * num_heads + head
        tl.store(states_ptr + row * (P * N) + cells, state.to(states_ptr.dtype.element_ty), mask=is_cell)
        start = tl.cast(chunk * K, tl.int64)
        inside = k < length - chunk * K
        values = value_ptr + start * value_stride_l + (k[None, :] * value_stride_l + p[:, None])
        value = tl.load(values, mask=is_p[:, None] & inside[None, :], other=0.0)
        keys = key_ptr + start * key_stride_l + (k[:, None] * key_stride_l + n[None, :])
        key = tl.load(keys, mask=inside[:, None] & is_n[None, :], other=0.0)
        weight = tl.load(weight_ptr + row * K + k)
        weighted = (value.to(tl.float32) * weight[None, :]).to(key.dtype)
        state *= tl.load(total_ptr + row)
        if REVERSE:
            other = tl.load(other_states_ptr + row * (P * N) + cells, mask=is_cell, other=0.0)
            passed = tl.sum(state * other.to(tl.float32), axis=1)
            tl.store(across_ptr + (row * tl.num_programs(0) + part) * BLOCK_P + tl.arange(0, BLOCK_P), passed)
        state = tl.dot(weighted, key, state, input_precision=PRECISION)

    tl.store(final_ptr + (batch * num_heads + head) * (P * N) + cells, state, mask=is_cell)


@triton.jit(do_not_specialize=["length", "num_chunks"])
def chunk_output_kernel(
    x_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    states_ptr,
    target_ptr,
    source_ptr,
    out_ptr,
    document_ptr,
    y_ptr,
    length,
    num_chunks,
    num_heads,
    num_heads_per_group,
    x_stride_b,
    x_stride_l,
    x_stride_h,
    B_stride_b,
    B_stride_l,
    B_stride_g,
    C_stride_b,
    C_stride_l,
    C_stride_g,
    y_stride_b,
    y_stride_l,
    y_stride_h,
    HAS_DOCUMENTS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = ((C B^T) 2^(target - source) + D 1) x + out (C H^T) for BLOCK_L targets of a chunk and NUM_HEADS heads of a group.

    Grid (K / BLOCK_L blocks of targets in S chunks, blocks of heads, B). C B^T is made once and serves all heads.
    """
    num_blocks: tl.constexpr = K // BLOCK_L
    chunk, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    batch = tl.program_id(2).to(tl.int64)
    num_parts = tl.cdiv(num_heads_per_group, NUM_HEADS)
    group, first = tl.program_id(1) // num_parts, (tl.program_id(1) % num_parts) * NUM_HEADS
    start = tl.cast(chunk * K, tl.int64)
    k, p, n = tl.arange(0, K), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    j = block * BLOCK_L + tl.arange(0, BLOCK_L)
    is_p, is_n, inside, inside_j = p < P, n < N, k < length - chunk * K, j < length - chunk * K

    C_ptr += batch * C_stride_b + group * C_stride_g + start * C_stride_l
    B_ptr += batch * B_stride_b + group * B_stride_g + start * B_stride_l
    C = tl.load(C_ptr + j[:, None] * C_stride_l + n[None, :], mask=inside_j[:, None] & is_n[None, :], other=0.0)
    B = tl.load(B_ptr + k[:, None] * B_stride_l + n[None, :], mask=inside[:, None] & is_n[None, :], other=0.0)
    scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)
    readable, diagonal = j[:, None] >= k[None, :], j[:, None] == k[None, :]
    if HAS_DOCUMENTS:
        document_j = load_documents(document_ptr, batch, length, chunk * K + j)
        document_k = load_documents(document_ptr, batch, length, chunk * K + k)
        readable = readable & (document_j[:, None] == document_k[None, :])

    x_ptr += batch * x_stride_b + start * x_stride_l
    y_ptr += batch * y_stride_b + start * y_stride_l
    for i in range(tl.minimum(NUM_HEADS, num_heads_per_group - first)):
        head = group * num_heads_per_group + first + i
        row = (batch * num_chunks + chunk) * num_heads + head
        x = tl.load(x_ptr + head * x_stride_h + k[:, None] * x_stride_l + p[None, :], mask=inside[:, None] & is_p[None, :], other=0.0)
        state = tl.load(states_ptr + row * (P * N) + p[:, None] * N + n[None, :], mask=is_p[:, None] & is_n[None, :], other=0.0)
        target, source, out = tl.load(target_ptr + row * K + j), tl.load(source_ptr + row * K + k), tl.load(out_ptr + row * K + j)
        weight = tl.exp2(tl.where(readable, target[:, None] - source[None, :], float("-inf")))
        mixing = scores * weight + tl.where(diagonal, tl.load(D_ptr + head).to(tl.float32), 0.0)
        y = tl.dot(C, tl.trans(state), input_precision=PRECISION) * out[:, None]
        y = tl.dot(mixing.to(x.dtype), x, y, input_precision=PRECISION)
        tl.store(
            y_ptr + head * y_stride_h + j[:, None] * y_stride_l + p[None, :],
            y.to(y_ptr.dtype.element_ty),
            mask=inside_j[:, None] & is_p[None, :],
        )
