"""Depthwise causal convolution with SiLU in Triton: `conv1d.causal_conv1d_reference`, forward and backward.

A program owns a block of channels and walks down a run of positions with the last W inputs in registers, so that every input is read
once; the backward also keeps the last W gradients of the pre-activation, which it recomputes, and sums the weights' gradients as it
goes, to be added up over the programs in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hybrid.ops.conv1d import last_inputs
from megatron_hybrid.ops.segments import number_documents
from megatron_hybrid.ops.triton.launch import CONV_LAUNCH, ConvLaunch, check_tensors, dense_like, with_dense_rows
from megatron_hybrid.ops.triton.row_sum import gradient_from_parts
from megatron_hybrid.ops.triton.ssd_kernels import load_documents


@triton.jit
def _load_input(
    x_ptr, initial_ptr, channel, is_channel, position, length, x_stride_l, num_channels, HAS_INITIAL: tl.constexpr, W: tl.constexpr
):
    """Inputs [BLOCK_C] fp32 at one position; before the sequence they are the initial state's, or zero."""
    offset = tl.cast(position, tl.int64) * x_stride_l
    x = tl.load(x_ptr + offset + channel, mask=is_channel & (position >= 0) & (position < length), other=0.0).to(tl.float32)
    if HAS_INITIAL:
        before = initial_ptr + (position + (W - 1)) * num_channels + channel
        x += tl.load(before, mask=is_channel & (position < 0), other=0.0).to(tl.float32)
    return x


@triton.jit
def _load_taps(weight_ptr, channel, is_channel, W: tl.constexpr):
    taps = ()
    for w in tl.static_range(W):
        taps = taps + (tl.load(weight_ptr + channel * W + w, mask=is_channel, other=0.0).to(tl.float32),)
    return taps


@triton.jit(do_not_specialize=["length"])
def conv1d_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    initial_ptr,
    document_ptr,
    y_ptr,
    length,
    num_channels,
    x_stride_b,
    x_stride_l,
    y_stride_b,
    y_stride_l,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    W: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (blocks of channels, runs of NUM_TILES TILE positions, B); TILE positions are loaded before the first one is used."""
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < num_channels
    start = tl.program_id(1) * (NUM_TILES * TILE)
    x_ptr += batch * x_stride_b
    y_ptr += batch * y_stride_b
    if HAS_INITIAL:
        initial_ptr += batch * (W - 1) * num_channels
    taps = _load_taps(weight_ptr, channel, is_channel, W)
    bias = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)

    # the last W inputs; the oldest is dropped before its first use
    window, documents = (bias,), (0,)
    for w in tl.static_range(1, W):
        position = start + (w - W)
        window = window + (
            _load_input(x_ptr, initial_ptr, channel, is_channel, position, length, x_stride_l, num_channels, HAS_INITIAL, W),
        )
        documents = documents + (load_documents(document_ptr, batch, length, position) if HAS_DOCUMENTS else 0,)
    for tile in range(NUM_TILES):
        first = start + tile * TILE
        inputs = ()
        for u in tl.static_range(TILE):
            inputs = inputs + (_load_input(x_ptr, initial_ptr, channel, is_channel, first + u, length, x_stride_l, num_channels, False, W),)
        for u in tl.static_range(TILE):
            position = first + u
            window = window[1:] + (inputs[u],)
            total = bias
            if HAS_DOCUMENTS:
                document = load_documents(document_ptr, batch, length, position)
                documents = documents[1:] + (document,)
                for w in tl.static_range(W):
                    total += tl.where(documents[w] == document, taps[w] * window[w], 0.0)
            else:
                for w in tl.static_range(W):
                    total += taps[w] * window[w]
            y = total / (1.0 + tl.exp(-total))
            offset = tl.cast(position, tl.int64) * y_stride_l
            tl.store(y_ptr + offset + channel, y.to(y_ptr.dtype.element_ty), mask=is_channel & (position < length))


@triton.jit(do_not_specialize=["length"])
def conv1d_backward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    initial_ptr,
    document_ptr,
    dy_ptr,
    dx_ptr,
    dinitial_ptr,
    dweight_ptr,
    length,
    num_channels,
    x_stride_b,
    x_stride_l,
    dy_stride_b,
    dy_stride_l,
    dx_stride_b,
    dx_stride_l,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    W: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (blocks of channels, runs, B). A run reads NUM_TILES TILE gradients of y and finishes the W - 1 fewer inputs they reach.

    dweight is [runs B, W + 1, C] fp32, the bias' gradient last; a run counts those positions that its dx covers, once each.
    """
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < num_channels
    start = tl.program_id(1) * (NUM_TILES * TILE - (W - 1))
    end = start + (NUM_TILES * TILE - (W - 1))
    x_ptr += batch * x_stride_b
    dy_ptr += batch * dy_stride_b
    dx_ptr += batch * dx_stride_b
    if HAS_INITIAL:
        initial_ptr += batch * (W - 1) * num_channels
        dinitial_ptr += batch * (W - 1) * num_channels
    taps = _load_taps(weight_ptr, channel, is_channel, W)
    zero = tl.zeros((BLOCK_C,), dtype=tl.float32)
    bias = zero
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)

    window, dwindow, documents, dtaps, dbias = (zero,), (zero,), (0,), (zero,), zero
    for w in tl.static_range(1, W):
        position = start + (w - W)
        window = window + (
            _load_input(x_ptr, initial_ptr, channel, is_channel, position, length, x_stride_l, num_channels, HAS_INITIAL, W),
        )
        documents = documents + (load_documents(document_ptr, batch, length, position) if HAS_DOCUMENTS else 0,)
        dwindow = dwindow + (zero,)
        dtaps = dtaps + (zero,)
    for tile in range(NUM_TILES):
        first = start + tile * TILE
        inputs, dys = (), ()
        for u in tl.static_range(TILE):
            inputs = inputs + (_load_input(x_ptr, initial_ptr, channel, is_channel, first + u, length, x_stride_l, num_channels, False, W),)
            offset = tl.cast(first + u, tl.int64) * dy_stride_l
            dys = dys + (tl.load(dy_ptr + offset + channel, mask=is_channel & (first + u < length), other=0.0).to(tl.float32),)
        for u in tl.static_range(TILE):
            position = first + u
            window = window[1:] + (inputs[u],)
            total = bias
            if HAS_DOCUMENTS:
                document = load_documents(document_ptr, batch, length, position)
                documents = documents[1:] + (document,)
                for w in tl.static_range(W):
                    total += tl.where(documents[w] == document, taps[w] * window[w], 0.0)
            else:
                for w in tl.static_range(W):
                    total += taps[w] * window[w]
            sigmoid = 1.0 / (1.0 + tl.exp(-total))
            dtotal = dys[u] * sigmoid * (1.0 + total * (1.0 - sigmoid))
            dwindow = dwindow[1:] + (dtotal,)

            # dx of the oldest input in reach: tap w carries it to the position W - 1 - w behind it
            dx = zero
            owned = tl.where(position < end, dtotal, 0.0)
            dbias += owned
            sums = ()
            for w in tl.static_range(W):
                if HAS_DOCUMENTS:
                    dx += tl.where(documents[W - 1 - w] == documents[0], taps[w] * dwindow[W - 1 - w], 0.0)
                    sums = sums + (dtaps[w] + tl.where(documents[w] == document, owned * window[w], 0.0),)
                else:
                    dx += taps[w] * dwindow[W - 1 - w]
                    sums = sums + (dtaps[w] + owned * window[w],)
            dtaps = sums
            reached = position - (W - 1)
            offset = tl.cast(reached, tl.int64) * dx_stride_l
            tl.store(dx_ptr + offset + channel, dx.to(dx_ptr.dtype.element_ty), mask=is_channel & (reached >= start) & (reached < length))
            if HAS_INITIAL:
                before = dinitial_ptr + (reached + (W - 1)) * num_channels + channel
                tl.store(before, dx.to(dinitial_ptr.dtype.element_ty), mask=is_channel & (reached < 0))

    dweight_ptr += (batch * tl.num_programs(1) + tl.program_id(1)) * (W + 1) * num_channels
    for w in tl.static_range(W):
        tl.store(dweight_ptr + w * num_channels + channel, dtaps[w], mask=is_channel)
    tl.store(dweight_ptr + W * num_channels + channel, dbias, mask=is_channel)


def causal_conv1d(
    x_BLC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    *,
    segment_ids_BL: Tensor | None = None,
    initial_state_BTC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d_reference` on a GPU; sums in fp32, y in the memory order of x. Keeps x and recomputes the pre-activation.

    Raises ValueError: x is on a CPU or in a dtype the kernels do not take.
    """
    check_tensors(x_BLC=x_BLC, weight_CW=weight_CW)
    document_BL = None if segment_ids_BL is None else number_documents(segment_ids_BL)
    numbers_BL = None if document_BL is None else document_BL.int()
    y_BLC = _CausalConv1d.apply(x_BLC, weight_CW, bias_C, numbers_BL, initial_state_BTC)
    return y_BLC, last_inputs(x_BLC, weight_CW.shape[1] - 1, document_BL, initial_state_BTC)


def conv_forward(
    x_BLC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    document_BL: Tensor | None,
    initial_BTC: Tensor | None,
    y_BLC: Tensor,
    launch: ConvLaunch = CONV_LAUNCH,
) -> None:
    """Write y; x and y in any strides with dense channels."""
    (batch, length, num_channels), num_taps = x_BLC.shape, weight_CW.shape[1]
    run_length = launch.num_tiles * launch.tile
    conv1d_forward_kernel[(triton.cdiv(num_channels, launch.block_c), triton.cdiv(length, run_length), batch)](
        x_BLC,
        weight_CW.contiguous(),
        bias_C,
        None if initial_BTC is None else initial_BTC.contiguous(),
        document_BL,
        y_BLC,
        length,
        num_channels,
        *x_BLC.stride()[:2],
        *y_BLC.stride()[:2],
        HAS_BIAS=bias_C is not None,
        HAS_INITIAL=initial_BTC is not None,
        HAS_DOCUMENTS=document_BL is not None,
        W=num_taps,
        NUM_TILES=launch.num_tiles,
        TILE=launch.tile,
        BLOCK_C=launch.block_c,
        num_warps=launch.num_warps,
    )


def conv_backward(
    x_BLC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    document_BL: Tensor | None,
    initial_BTC: Tensor | None,
    dy_BLC: Tensor,
    dx_BLC: Tensor,
    launch: ConvLaunch = CONV_LAUNCH,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Write dx; return the gradients of the weight, in parts [X, W, C], and of the bias, in parts [X, 1, C], fp32, and that of the initial
    state, if there is one."""
    (batch, length, num_channels), num_taps = x_BLC.shape, weight_CW.shape[1]
    num_runs = triton.cdiv(length, launch.num_tiles * launch.tile - (num_taps - 1))
    sums_XWC = torch.empty(num_runs * batch, num_taps + 1, num_channels, dtype=torch.float32, device=x_BLC.device)
    dinitial_BTC = None if initial_BTC is None else torch.empty_like(initial_BTC, memory_format=torch.contiguous_format)
    conv1d_backward_kernel[(triton.cdiv(num_channels, launch.block_c), num_runs, batch)](
        x_BLC,
        weight_CW.contiguous(),
        bias_C,
        None if initial_BTC is None else initial_BTC.contiguous(),
        document_BL,
        dy_BLC,
        dx_BLC,
        dinitial_BTC,
        sums_XWC,
        length,
        num_channels,
        *x_BLC.stride()[:2],
        *dy_BLC.stride()[:2],
        *dx_BLC.stride()[:2],
        HAS_BIAS=bias_C is not None,
        HAS_INITIAL=initial_BTC is not None,
        HAS_DOCUMENTS=document_BL is not None,
        W=num_taps,
        NUM_TILES=launch.num_tiles,
        TILE=launch.tile,
        BLOCK_C=launch.block_c,
        num_warps=launch.num_warps,
    )
    return sums_XWC[:, :-1], sums_XWC[:, -1:], dinitial_BTC


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x_BLC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_BL: Tensor | None, initial_BTC: Tensor | None
    ) -> Tensor:
        x_BLC = with_dense_rows(x_BLC)
        y_BLC = dense_like(x_BLC)
        conv_forward(x_BLC, weight_CW, bias_C, document_BL, initial_BTC, y_BLC)
        ctx.save_for_backward(x_BLC, weight_CW, bias_C, document_BL, initial_BTC)
        return y_BLC

    @staticmethod
    def backward(ctx, dy_BLC: Tensor) -> tuple[Tensor | None, ...]:
        x_BLC, weight_CW, bias_C, document_BL, initial_BTC = ctx.saved_tensors
        dx_BLC = dense_like(x_BLC)
        dweight_XWC, dbias_X1C, dinitial_BTC = conv_backward(
            x_BLC, weight_CW, bias_C, document_BL, initial_BTC, with_dense_rows(dy_BLC), dx_BLC
        )
        dbias_C = None if bias_C is None else gradient_from_parts(bias_C, dbias_X1C)
        return dx_BLC, gradient_from_parts(weight_CW, dweight_XWC), dbias_C, None, dinitial_BTC
