"""The linears of a decoding step: ``ops.decode.norm_linear`` and ``linear``.

For a few sequences a product is a walk over its weight, and the kernel here does on the way what would be kernels of their own: the norm
before it (the sum of squares is taken along, and scales the result) and the activation or the residual after it. A program takes some rows
of the weight whole, in tiles that are all asked for at once. From more sequences on, the product is cuBLAS's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_FUSED_BATCH = 4
"""Above it the multiplications of a walk, done without tensor cores, take longer than the memory."""
_TILE = 4096
"""Elements of a weight's tile."""
_ENOUGH_PROGRAMS = 528
"""Four for each multiprocessor of a large GPU."""


def norm_linear(x_BD: Tensor, norm_weight_D: Tensor, weight_OD: Tensor, eps: float, *, squared_relu: bool = False) -> Tensor:
    """``ops.decode.norm_linear``."""
    if x_BD.shape[0] <= MAX_FUSED_BATCH:
        return walk(x_BD, weight_OD, norm_weight=norm_weight_D, residual=None, eps=eps, squared_relu=squared_relu)
    y_BO = torch.nn.functional.linear(rms_norm(x_BD, norm_weight_D, eps), weight_OD)
    return torch.relu_(y_BO).square_() if squared_relu else y_BO


def linear(x_BI: Tensor, weight_OI: Tensor, residual_BO: Tensor | None) -> Tensor:
    """``ops.decode.linear``; the residual may be overwritten."""
    if x_BI.shape[0] <= MAX_FUSED_BATCH:
        return walk(x_BI, weight_OI, norm_weight=None, residual=residual_BO, eps=0.0, squared_relu=False)
    return torch.nn.functional.linear(x_BI, weight_OI) if residual_BO is None else residual_BO.addmm_(x_BI, weight_OI.t())


def rms_norm(x_BD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of every row in one kernel."""
    out_BD = torch.empty_like(x_BD)
    size = x_BD.shape[1]
    _rms_norm_kernel[(x_BD.shape[0],)](x_BD, weight_D, out_BD, x_BD.stride(0), size, eps, BLOCK=triton.next_power_of_2(size), num_warps=8)
    return out_BD


def walk(x: Tensor, weight: Tensor, *, norm_weight: Tensor | None, residual: Tensor | None, eps: float, squared_relu: bool) -> Tensor:
    """``residual + activation(norm(x) @ weight.T)`` in one kernel; what is None is left out."""
    (batch, input_size), output_size = x.shape, weight.shape[0]
    assert weight.is_contiguous() and x.stride(1) == 1 and (residual is None or residual.is_contiguous())
    out = x.new_empty(batch, output_size)
    block_k = min(1024, triton.next_power_of_2(input_size))
    block_o = max(1, _TILE // block_k)
    while block_o > 1 and triton.cdiv(output_size, block_o) < _ENOUGH_PROGRAMS:
        block_o //= 2
    _walk_kernel[(triton.cdiv(output_size, block_o),)](
        x,
        norm_weight,
        weight,
        residual,
        out,
        x.stride(0),
        output_size,
        eps,
        BATCH=batch,
        INPUT_SIZE=input_size,
        HAS_NORM=norm_weight is not None,
        HAS_RESIDUAL=residual is not None,
        SQUARED_RELU=squared_relu,
        BLOCK_O=block_o,
        BLOCK_K=block_k,
        num_warps=4,
    )
    return out


@triton.jit
def _walk_kernel(
    x_ptr,
    norm_weight_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    x_stride,
    output_size,
    eps,
    BATCH: tl.constexpr,
    INPUT_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SQUARED_RELU: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    has_o = o < output_size
    k = tl.arange(0, BLOCK_K)
    tile_ptr = weight_ptr + o.to(tl.int64)[:, None] * INPUT_SIZE + k[None, :]
    # A sequence at a time: the weight comes from memory for the first one, and from the nearest cache after that.
    for sequence in tl.static_range(BATCH):
        sum_OK = tl.zeros((BLOCK_O, BLOCK_K), dtype=tl.float32)
        squares_K = tl.zeros((BLOCK_K,), dtype=tl.float32)
        for start in tl.static_range(0, INPUT_SIZE, BLOCK_K):
            has_k = start + k < INPUT_SIZE
            x_K = tl.load(x_ptr + sequence * x_stride + start + k, mask=has_k, other=0.0).to(tl.float32)
            weight_OK = tl.load(tile_ptr + start, mask=has_o[:, None] & has_k[None, :], other=0.0).to(tl.float32)
            if HAS_NORM:
                squares_K += x_K * x_K
                x_K *= tl.load(norm_weight_ptr + start + k, mask=has_k, other=0.0).to(tl.float32)
            sum_OK += weight_OK * x_K[None, :]
        y_O = tl.sum(sum_OK, axis=1)
        if HAS_NORM:
            y_O *= tl.rsqrt(tl.sum(squares_K) / INPUT_SIZE + eps)
        if SQUARED_RELU:
            y_O = tl.maximum(y_O, 0.0)
            y_O *= y_O
        if HAS_RESIDUAL:
            y_O += tl.load(residual_ptr + sequence * output_size + o, mask=has_o, other=0.0).to(tl.float32)
        tl.store(out_ptr + sequence * output_size + o, y_O.to(out_ptr.dtype.element_ty), mask=has_o)


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, x_stride, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    is_there = place < size
    x = tl.load(x_ptr + row * x_stride + place, mask=is_there, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + place, mask=is_there, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x) / size + eps) * weight
    tl.store(out_ptr + row * size + place, normed.to(out_ptr.dtype.element_ty), mask=is_there)
