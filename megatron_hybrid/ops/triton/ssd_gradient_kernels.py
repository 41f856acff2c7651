"""Kernels of the backward of the chunked Mamba-2 scan, beside the reverse walk in `ssd_kernels.py`, whose shapes and vectors they share."""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_hybrid.ops.triton.ssd_kernels import load_documents, softplus, sum_since_restart


@triton.jit(do_not_specialize=["length", "num_chunks"])
def source_gradient_kernel(
    x_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    dy_ptr,
    dstates_ptr,
    target_ptr,
    source_ptr,
    into_ptr,
    document_ptr,
    dx_ptr,
    dscores_ptr,
    at_target_ptr,
    at_source_ptr,
    dD_ptr,
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
    dy_stride_b,
    dy_stride_l,
    dy_stride_h,
    dx_stride_b,
    dx_stride_l,
    dx_stride_h,
    HAS_DOCUMENTS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx of a chunk from dy and the gradient of the state behind the chunk. Grid (S, G, B).

    One program walks over the heads of its group and sums the gradient of B C^T in registers, in a fixed order. Matrices over pairs stand
    with sources in rows, so that the weights of the sources are the next product's operand without leaving registers, and are made by tiles
    of TILE targets, B C^T anew for each head, because all of it would not fit. Besides, fp32: for [B, S, H, K], at_target and at_source,
    the sums of mixing times its gradient over sources and over targets; dD [B, S, H]; and dscores [B, S, G, K sources, K targets] in the
    dtype of B.
    """
    num_tiles: tl.constexpr = K // TILE
    chunk, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = tl.cast(chunk * K, tl.int64)
    k, j, p, n = tl.arange(0, K), tl.arange(0, TILE), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    is_p, is_n, inside = p < P, n < N, k < length - chunk * K
    is_cell = is_p[:, None] & is_n[None, :]

    B_ptr += batch * B_stride_b + group * B_stride_g + start * B_stride_l
    C_ptr += batch * C_stride_b + group * C_stride_g + start * C_stride_l
    B = tl.load(B_ptr + k[:, None] * B_stride_l + n[None, :], mask=inside[:, None] & is_n[None, :], other=0.0)
    Cs, dscores = (), ()
    for t in tl.static_range(num_tiles):
        target_k = t * TILE + j
        mask = (target_k < length - chunk * K)[:, None] & is_n[None, :]
        Cs = Cs + (tl.load(C_ptr + target_k[:, None] * C_stride_l + n[None, :], mask=mask, other=0.0),)
        dscores = dscores + (tl.zeros((K, TILE), dtype=tl.float32),)
    if HAS_DOCUMENTS:
        document = load_documents(document_ptr, batch, length, chunk * K + k)

    x_ptr += batch * x_stride_b + start * x_stride_l
    dy_ptr += batch * dy_stride_b + start * dy_stride_l
    dx_ptr += batch * dx_stride_b + start * dx_stride_l
    for i in range(num_heads_per_group):
        head = group * num_heads_per_group + i
        row = (batch * num_chunks + chunk) * num_heads + head
        is_x = inside[:, None] & is_p[None, :]
        x = tl.load(x_ptr + head * x_stride_h + k[:, None] * x_stride_l + p[None, :], mask=is_x, other=0.0)
        dstate = tl.load(dstates_ptr + row * (P * N) + p[:, None] * N + n[None, :], mask=is_cell, other=0.0)
        source, into = tl.load(source_ptr + row * K + k), tl.load(into_ptr + row * K + k)
        D = tl.load(D_ptr + head).to(tl.float32)
        dx = tl.zeros((K, BLOCK_P), dtype=tl.float32)
        dD, at_source, sums = 0.0, tl.zeros((K,), dtype=tl.float32), ()
        for t in tl.static_range(num_tiles):
            target_k = t * TILE + j
            is_y = (target_k < length - chunk * K)[:, None] & is_p[None, :]
            dy = tl.load(dy_ptr + head * dy_stride_h + target_k[:, None] * dy_stride_l + p[None, :], mask=is_y, other=0.0)
            target = tl.load(target_ptr + row * K + target_k)
            readable, diagonal = k[:, None] <= target_k[None, :], k[:, None] == target_k[None, :]
            if HAS_DOCUMENTS:
                document_j = load_documents(document_ptr, batch, length, chunk * K + target_k)
                readable = readable & (document[:, None] == document_j[None, :])
            weight = tl.exp2(tl.where(readable, target[None, :] - source[:, None], float("-inf")))
            mixing = tl.dot(B, tl.trans(Cs[t]), input_precision=PRECISION) * weight
            dx = tl.dot((mixing + tl.where(diagonal, D, 0.0)).to(x.dtype), dy, dx, input_precision=PRECISION)
            dmixing = tl.dot(x, tl.trans(dy), input_precision=PRECISION)
            dD += tl.sum(tl.sum(tl.where(diagonal, dmixing, 0.0), axis=1), axis=0)
            sums = sums + (dscores[t] + dmixing * weight,)
            mixing *= dmixing
            at_source += tl.sum(mixing, axis=1)
            tl.store(at_target_ptr + row * K + target_k, tl.sum(mixing, axis=0))
        dscores = sums
        dx += tl.dot(B, tl.trans(dstate), input_precision=PRECISION) * into[:, None]
        tl.store(dD_ptr + row, dD)
        tl.store(at_source_ptr + row * K + k, at_source)
        tl.store(dx_ptr + head * dx_stride_h + k[:, None] * dx_stride_l + p[None, :], dx.to(dx_ptr.dtype.element_ty), mask=is_x)

    dscores_ptr += ((batch * num_chunks + chunk) * tl.num_programs(1) + group) * (K * K)
    for t in tl.static_range(num_tiles):
        offsets = k[:, None] * K + (t * TILE + j)[None, :]
        tl.store(dscores_ptr + offsets, dscores[t].to(dscores_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["length", "num_chunks"])
def key_gradient_kernel(
    value_ptr,
    key_ptr,
    other_key_ptr,
    states_ptr,
    dscores_ptr,
    weight_ptr,
    dkey_ptr,
    through_ptr,
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
    other_key_stride_b,
    other_key_stride_l,
    other_key_stride_g,
    dkey_stride_b,
    dkey_stride_l,
    dkey_stride_g,
    OF_TARGETS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dkey = sum over heads of (weight value) state + dscores other_key, for the chunk's B or, OF_TARGETS, its C. Grid (S, G, B).

    Of B: value x, weight into, the gradient of the state behind the chunk, dscores. Of C: value dy, weight out, the state in front of the
    chunk, dscores^T. The heads of a group are summed in registers in a fixed order. Besides, fp32: through [B, S, H, K], what goes from
    each source to the state behind, or to each target from the state in front, <key state^T, weight value> by rows.
    """
    chunk, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = tl.cast(chunk * K, tl.int64)
    k, p, n = tl.arange(0, K), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    is_p, is_n, inside = p < P, n < N, k < length - chunk * K
    is_key = inside[:, None] & is_n[None, :]

    key_ptr += batch * key_stride_b + group * key_stride_g + start * key_stride_l
    key = tl.load(key_ptr + k[:, None] * key_stride_l + n[None, :], mask=is_key, other=0.0)
    value_ptr += batch * value_stride_b + start * value_stride_l
    dkey = tl.zeros((K, BLOCK_N), dtype=tl.float32)
    for i in range(num_heads_per_group):
        head = group * num_heads_per_group + i
        row = (batch * num_chunks + chunk) * num_heads + head
        value = tl.load(
            value_ptr + head * value_stride_h + k[:, None] * value_stride_l + p[None, :], mask=inside[:, None] & is_p[None, :], other=0.0
        )
        state = tl.load(states_ptr + row * (P * N) + p[:, None] * N + n[None, :], mask=is_p[:, None] & is_n[None, :], other=0.0)
        weighted = value.to(tl.float32) * tl.load(weight_ptr + row * K + k)[:, None]
        read = tl.dot(key, tl.trans(state), input_precision=PRECISION)
        tl.store(through_ptr + row * K + k, tl.sum(read * weighted, axis=1))
        dkey = tl.dot(weighted.to(value.dtype), state, dkey, input_precision=PRECISION)

    other_key_ptr += batch * other_key_stride_b + group * other_key_stride_g + start * other_key_stride_l
    other_key = tl.load(other_key_ptr + k[:, None] * other_key_stride_l + n[None, :], mask=is_key, other=0.0)
    dscores_ptr += ((batch * num_chunks + chunk) * tl.num_programs(1) + group) * (K * K)
    if OF_TARGETS:
        dscores = tl.load(dscores_ptr + k[None, :] * K + k[:, None])
    else:
        dscores = tl.load(dscores_ptr + k[:, None] * K + k[None, :])
    dkey = tl.dot(dscores, other_key, dkey, input_precision=PRECISION)
    dkey_ptr += batch * dkey_stride_b + group * dkey_stride_g + start * dkey_stride_l
    tl.store(dkey_ptr + k[:, None] * dkey_stride_l + n[None, :], dkey.to(dkey_ptr.dtype.element_ty), mask=is_key)


@triton.jit(do_not_specialize=["length", "num_chunks"])
def decay_gradient_kernel(
    dt_raw_ptr,
    A_log_ptr,
    dt_bias_ptr,
    document_ptr,
    at_target_ptr,
    at_source_ptr,
    from_start_ptr,
    into_end_ptr,
    across_ptr,
    ddt_raw_ptr,
    dA_log_ptr,
    ddt_bias_ptr,
    length,
    num_chunks,
    num_heads,
    dt_stride_b,
    dt_stride_l,
    ddt_stride_b,
    ddt_stride_l,
    HAS_DOCUMENTS: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """From the products that pass over each step to the gradients of dt_raw, and of A_log and dt_bias per chunk, [B S, H] fp32.

    Grid (B S, blocks of heads). A step's decay is passed over by what its targets, itself and later, read of this document, less what
    starts there inside the chunk; by earlier sources on their way to the chunk's end; and from end to end.
    """
    batch, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    k = tl.arange(0, K)
    position = chunk * K + k
    is_head, inside = head < num_heads, position < length

    mask = inside[:, None] & is_head[None, :]
    rows = batch.to(tl.int64) * dt_stride_b + position.to(tl.int64) * dt_stride_l
    raw = tl.load(dt_raw_ptr + rows[:, None] + head[None, :], mask=mask, other=0.0).to(tl.float32)
    raw += tl.load(dt_bias_ptr + head, mask=is_head, other=0.0).to(tl.float32)[None, :]
    dt = softplus(raw)
    A = -tl.exp(tl.load(A_log_ptr + head, mask=is_head, other=0.0).to(tl.float32))

    row = (tl.program_id(0) * num_heads + head).to(tl.int64)
    offsets = row[None, :] * K + k[:, None]
    at_source = tl.load(at_source_ptr + offsets, mask=mask, other=0.0)
    over = tl.load(at_target_ptr + offsets, mask=mask, other=0.0) - at_source
    over += tl.load(from_start_ptr + offsets, mask=mask, other=0.0)
    into_end = tl.load(into_end_ptr + offsets, mask=mask, other=0.0)
    if HAS_DOCUMENTS:
        document = load_documents(document_ptr, batch, length, position)
        ends = document != load_documents(document_ptr, batch, length, position + 1)
        dstep = sum_since_restart(over, ends, reverse=True)
    else:
        dstep = tl.cumsum(over, axis=0, reverse=True)
    dstep += tl.cumsum(into_end, axis=0) - into_end
    w = tl.arange(0, BLOCK_W)
    across = tl.load(across_ptr + row[:, None] * W + w[None, :], mask=is_head[:, None] & (w < W)[None, :], other=0.0)
    dstep += tl.sum(across, axis=1)[None, :]

    # dt enters as log2 dt: it is -inf where dt underflowed, and nothing came from there
    ddt = dstep * A[None, :] + tl.where(dt > 0, (at_source + into_end) / tl.where(dt > 0, dt, 1.0), 0.0)
    ddt_raw = tl.where(mask, ddt / (1.0 + tl.exp(-raw)), 0.0)
    rows = batch.to(tl.int64) * ddt_stride_b + position.to(tl.int64) * ddt_stride_l
    tl.store(ddt_raw_ptr + rows[:, None] + head[None, :], ddt_raw.to(ddt_raw_ptr.dtype.element_ty), mask=mask)
    tl.store(ddt_bias_ptr + row, tl.sum(ddt_raw, axis=0), mask=is_head)
    tl.store(dA_log_ptr + row, A * tl.sum(tl.where(mask, dstep * dt, 0.0), axis=0), mask=is_head)
