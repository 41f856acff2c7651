"""Triton kernels that cast a matrix to float8 for NVIDIA's tensor cores, in one pass over it.

One kernel reads the matrix, applies what stands in front of the cast (squared ReLU, or its derivative), takes the amax and casts. Hopper
multiplies float8 matrices only along the fast axis of both, so that one used in forward and in backward is needed transposed as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hybrid.fp8.backends import Prologue
from megatron_hybrid.fp8.formats import Float8Format

_BLOCK_M, _BLOCK_K, _NUM_WARPS = 64, 128, 8


@triton.jit
def _load_tile(x_ptr, other_ptr, row, column, inside, x_stride, other_stride, PROLOGUE: tl.constexpr):
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if PROLOGUE == "squared_relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = x * x
    if PROLOGUE == "squared_relu_backward":
        other = tl.load(other_ptr + row * other_stride + column, mask=inside, other=0.0).to(tl.float32)
        x = x * (2.0 * tl.maximum(other, 0.0, propagate_nan=tl.PropagateNan.ALL))
    return x


@triton.jit
def _to_float8(x, scale, LARGEST: tl.constexpr, out_ptr):
    return tl.clamp(x * scale, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(out_ptr.dtype.element_ty)


@triton.jit
def _largest_magnitude(x):
    # As integers, since tl.max passes over NaN: the bits of magnitudes are ordered as the numbers are, NaN beyond infinity, which it
    # becomes, as in `backends.amax_plain`.
    bits = tl.max(tl.abs(x).to(tl.int32, bitcast=True))
    return tl.minimum(bits, 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _scales_kernel(amax_ptr, scale_ptr, inverse_ptr, LARGEST: tl.constexpr, LARGEST_FP32: tl.constexpr):
    amax = tl.load(amax_ptr)
    known = (amax > 0.0) & (amax < float("inf"))
    scale = tl.where(known, tl.minimum(tl.div_rn(LARGEST, tl.where(known, amax, 1.0)), LARGEST_FP32), 1.0)
    tl.store(scale_ptr, scale)
    tl.store(inverse_ptr, tl.div_rn(1.0, scale))


@triton.jit
def _amax_kernel(
    x_ptr,
    other_ptr,
    amax_ptr,
    num_rows,
    num_columns,
    x_stride,
    other_stride,
    PROLOGUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    inside = (row < num_rows) & (column < num_columns)
    x = _load_tile(x_ptr, other_ptr, row, column, inside, x_stride, other_stride, PROLOGUE)
    tl.atomic_max(amax_ptr, _largest_magnitude(x))


@triton.jit
def _cast_kernel(
    x_ptr,
    other_ptr,
    scale_ptr,
    amax_ptr,
    out_ptr,
    transposed_ptr,
    num_rows,
    num_columns,
    x_stride,
    other_stride,
    LARGEST: tl.constexpr,
    PROLOGUE: tl.constexpr,
    RECORD_AMAX: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    row, column = m[:, None], k[None, :]
    inside = (row < num_rows) & (column < num_columns)
    x = _load_tile(x_ptr, other_ptr, row, column, inside, x_stride, other_stride, PROLOGUE)
    tl.store(out_ptr + row * num_columns + column, _to_float8(x, tl.load(scale_ptr), LARGEST, out_ptr), mask=inside)
    if TRANSPOSE:
        # Read back what this program wrote, from the nearest cache: bytes of the registers above, stored transposed, come out wrong from
        # Triton 3.6 wherever a thread holds four of a row (docs/log.md).
        tl.debug_barrier()
        row, column = m[None, :], k[:, None]
        inside = (row < num_rows) & (column < num_columns)
        tl.store(transposed_ptr + column * num_rows + row, tl.load(out_ptr + row * num_columns + column, mask=inside), mask=inside)
    if RECORD_AMAX:
        # The maximum does not depend on the order of the programs.
        tl.atomic_max(amax_ptr, _largest_magnitude(x))


def _grid(x_MK: Tensor) -> tuple[int, int]:
    return triton.cdiv(x_MK.shape[0], _BLOCK_M), triton.cdiv(x_MK.shape[1], _BLOCK_K)


def amax(x_MK: Tensor, *, prologue: Prologue = "none", other_MK: Tensor | None = None) -> Tensor:
    """Largest magnitude of what the cast would be of, fp32 scalar; infinite where there is NaN."""
    result = torch.zeros((), dtype=torch.float32, device=x_MK.device)
    other_MK = x_MK if other_MK is None else other_MK
    _amax_kernel[_grid(x_MK)](
        x_MK,
        other_MK,
        result,
        *x_MK.shape,
        x_MK.stride(0),
        other_MK.stride(0),
        PROLOGUE=prologue,
        BLOCK_M=_BLOCK_M,
        BLOCK_K=_BLOCK_K,
        num_warps=_NUM_WARPS,
    )
    return result


def scales(amax: Tensor, to: Float8Format) -> tuple[Tensor, Tensor]:
    """`backends.scales_plain` in one launch."""
    scale, inverse = torch.empty_like(amax), torch.empty_like(amax)
    _scales_kernel[(1,)](amax, scale, inverse, LARGEST=to.largest, LARGEST_FP32=torch.finfo(torch.float32).max, num_warps=1)
    return scale, inverse


def cast(
    x_MK: Tensor,
    scale: Tensor,
    to: Float8Format,
    *,
    amax: Tensor | None = None,
    prologue: Prologue = "none",
    other_MK: Tensor | None = None,
    rows: bool = True,
    columns: bool = True,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """`backends.cast_plain` with a contiguous transpose; x is contiguous along K.

    [M, K] is written in any case, because the transpose is made from it.
    """
    assert x_MK.stride(1) == 1, x_MK.stride()
    if into is None:
        x_8 = torch.empty(x_MK.shape, dtype=to.dtype, device=x_MK.device)
        transposed_8 = torch.empty(x_MK.shape[::-1], dtype=to.dtype, device=x_MK.device) if columns else None
    else:
        x_8, transposed_8 = into
        assert x_8.is_contiguous() and transposed_8.is_contiguous()
    other_MK = x_MK if other_MK is None else other_MK
    _cast_kernel[_grid(x_MK)](
        x_MK,
        other_MK,
        scale,
        scale if amax is None else amax,
        x_8,
        x_8 if transposed_8 is None else transposed_8,
        *x_MK.shape,
        x_MK.stride(0),
        other_MK.stride(0),
        LARGEST=to.largest,
        PROLOGUE=prologue,
        RECORD_AMAX=amax is not None,
        TRANSPOSE=transposed_8 is not None,
        BLOCK_M=_BLOCK_M,
        BLOCK_K=_BLOCK_K,
        num_warps=_NUM_WARPS,
    )
    return x_8 if rows else None, transposed_8
