"""The linears of a decoding step: ``ops.decode.norm_linear`` and ``linear``.

For few sequences a product is a walk over its weight, and the kernels here do on the way what would be kernels of their own: the norm
before it (the sum of squares is taken along, and scales the result) and the activation or the residual after it. For one sequence a
program takes some rows of the weight whole, in tiles that are all asked for at once; for a few, tensor cores multiply tiles that are
loaded ahead. From more sequences on, the product is cuBLAS's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_FUSED_BATCH = 16
"""Rows of the smallest tile that tensor cores take."""
_TILE = 4096
"""Elements of a weight's tile in the walk of one sequence."""
_ENOUGH_PROGRAMS = 528
"""Four for each multiprocessor of a large GPU."""


def norm_linear(x_BD: Tensor, norm_weight_D: Tensor, weight_OD: Tensor, eps: float, *, squared_relu: bool = False) -> Tensor:
    """``ops.decode.norm_linear``."""
    if x_BD.shape[0] <= MAX_FUSED_BATCH:
        return fused(x_BD, weight_OD, norm_weight=norm_weight_D, residual=None, eps=eps, squared_relu=squared_relu)
    y_BO = torch.nn.functional.linear(rms_norm(x_BD, norm_weight_D, eps), weight_OD)
    return torch.relu_(y_BO).square_() if squared_relu else y_BO


def linear(x_BI: Tensor, weight_OI: Tensor, residual_BO: Tensor | None) -> Tensor:
    """``ops.decode.linear``; the residual may be overwritten."""
    if x_BI.shape[0] <= MAX_FUSED_BATCH:
        return fused(x_BI, weight_OI, norm_weight=None, residual=residual_BO, eps=0.0, squared_relu=False)
    return torch.nn.functional.linear(x_BI, weight_OI) if residual_BO is None else residual_BO.addmm_(x_BI, weight_OI.t())


def rms_norm(x_BD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of every row in one kernel."""
    out_BD = torch.empty_like(x_BD)
    size = x_BD.shape[1]
    _rms_norm_kernel[(x_BD.shape[0],)](x_BD, weight_D, out_BD, x_BD.stride(0), size, eps, BLOCK=triton.next_power_of_2(size), num_warps=8)
    return out_BD


def fused(x: Tensor, weight: Tensor, *, norm_weight: Tensor | None, residual: Tensor | None, eps: float, squared_relu: bool) -> Tensor:
    """``residual + activation(norm(x) @ weight.T)`` in one kernel, for at most ``MAX_FUSED_BATCH`` rows; what is None is left out."""
    (batch, input_size), output_size = x.shape, weight.shape[0]
    assert weight.is_contiguous() and x.stride(1) == 1 and (residual is None or residual.is_contiguous())
    out = x.new_empty(batch, output_size)
    arguments = (x, norm_weight, weight, residual, out, x.stride(0), output_size, eps)
    what = {"HAS_NORM": norm_weight is not None, "HAS_RESIDUAL": residual is not None, "SQUARED_RELU": squared_relu}
    if batch == 1:
        block_k = min(1024, triton.next_power_of_2(input_size))
        block_o = max(1, _TILE // block_k)
        while block_o > 1 and triton.cdiv(output_size, block_o) < _ENOUGH_PROGRAMS:
            block_o //= 2
        grid = (triton.cdiv(output_size, block_o),)
        _walk_kernel[grid](*arguments, INPUT_SIZE=input_size, **what, BLOCK_O=block_o, BLOCK_K=block_k, num_warps=4)
        return out
    is_wide = output_size >= 4096
    block_o, block_k = 32 if is_wide else 16, 256
    _multiply_kernel[(triton.cdiv(output_size, block_o),)](
        *arguments,
        batch,
        INPUT_SIZE=input_size,
        **what,
        DOT_DTYPE=tl.float32 if triton.knobs.runtime.interpret or x.dtype == torch.float32 else tl.bfloat16,
        BLOCK_B=MAX_FUSED_BATCH,
        BLOCK_O=block_o,
        BLOCK_K=block_k if x.dtype != torch.float32 else 64,
        num_warps=4,
        num_stages=4,
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
    sum_OK = tl.zeros((BLOCK_O, BLOCK_K), dtype=tl.float32)
    squares_K = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in tl.static_range(0, INPUT_SIZE, BLOCK_K):
        has_k = start + k < INPUT_SIZE
        x_K = tl.load(x_ptr + start + k, mask=has_k, other=0.0).to(tl.float32)
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
        y_O += tl.load(residual_ptr + o, mask=has_o, other=0.0).to(tl.float32)
    tl.store(out_ptr + o, y_O.to(out_ptr.dtype.element_ty), mask=has_o)


@triton.jit
def _multiply_kernel(
    x_ptr,
    norm_weight_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    x_stride,
    output_size,
    eps,
    batch,
    INPUT_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SQUARED_RELU: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o, b, k = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_K)
    has_o, has_b = o < output_size, b < batch
    tile_ptr = weight_ptr + o.to(tl.int64)[None, :] * INPUT_SIZE + k[:, None]
    sum_BO = tl.zeros((BLOCK_B, BLOCK_O), dtype=tl.float32)
    squares_B = tl.zeros((BLOCK_B,), dtype=tl.float32)
    for start in range(0, INPUT_SIZE, BLOCK_K):
        has_k = start + k < INPUT_SIZE
        x_BK = tl.load(x_ptr + b[:, None] * x_stride + start + k[None, :], mask=has_b[:, None] & has_k[None, :], other=0.0)
        weight_KO = tl.load(tile_ptr + start, mask=has_k[:, None] & has_o[None, :], other=0.0)
        if HAS_NORM:
            wide_BK = x_BK.to(tl.float32)
            squares_B += tl.sum(wide_BK * wide_BK, axis=1)
            norm_K = tl.load(norm_weight_ptr + start + k, mask=has_k, other=0.0).to(tl.float32)
            x_BK = (wide_BK * norm_K[None, :]).to(x_BK.dtype)
        sum_BO += tl.dot(x_BK.to(DOT_DTYPE), weight_KO.to(DOT_DTYPE), input_precision="ieee")
    if HAS_NORM:
        sum_BO *= tl.rsqrt(squares_B / INPUT_SIZE + eps)[:, None]
    if SQUARED_RELU:
        sum_BO = tl.maximum(sum_BO, 0.0)
        sum_BO *= sum_BO
    place_BO = b[:, None] * output_size + o[None, :]
    has_BO = has_b[:, None] & has_o[None, :]
    if HAS_RESIDUAL:
        sum_BO += tl.load(residual_ptr + place_BO, mask=has_BO, other=0.0).to(tl.float32)
    tl.store(out_ptr + place_BO, sum_BO.to(out_ptr.dtype.element_ty), mask=has_BO)


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, x_stride, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    is_there = place < size
    x = tl.load(x_ptr + row * x_stride + place, mask=is_there, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + place, mask=is_there, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x) / size + eps) * weight
    tl.store(out_ptr + row * size + place, normed.to(out_ptr.dtype.element_ty), mask=is_there)
