"""Gradients of small weights, which kernels leave in parts: summed in a fixed order, straight into the weight's fp32 buffer.

Norms, convolutions and the scan's vectors have few numbers and many parts, one for each run of positions. Sum, cast and the wrapper's
addition took three launches for each weight and micro-batch, 1 % of a step of a small model.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_hybrid.ops.main_grad import has_main_grad, mark_added

_BLOCK_X, _BLOCK_B = 64, 32


@triton.jit(do_not_specialize=["num_parts"])
def _add_sums_kernel(
    parts_ptr,
    out_ptr,
    num_parts,
    num_columns,
    part_stride,
    row_stride,
    out_row_stride,
    out_column_stride,
    BLOCK_X: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Grid (rows A, blocks of columns)."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    sums = tl.zeros((BLOCK_X, BLOCK_B), dtype=tl.float32)
    for start in range(0, num_parts, BLOCK_X):
        part = start + tl.arange(0, BLOCK_X)
        mask = (part < num_parts)[:, None] & (column < num_columns)[None, :]
        sums += tl.load(parts_ptr + part[:, None].to(tl.int64) * part_stride + row * row_stride + column[None, :], mask=mask, other=0.0)
    out = out_ptr + row * out_row_stride + column * out_column_stride
    inside = column < num_columns
    tl.store(out, tl.load(out, mask=inside, other=0.0) + tl.sum(sums, axis=0), mask=inside)


def gradient_from_parts(weight: Tensor, parts_XAB: Tensor) -> Tensor:
    """The gradient of a weight [B], [B, A] or [B, 1, A] that is the sum over X of parts [X, A, B], A being 1 for a vector.

    Args:
        weight: the parameter.
        parts_XAB: fp32, dense along B.

    Returns:
        What autograd gets for the weight: its gradient, or the placeholder for it where it was added to the weight's ``main_grad``.
    """
    if not has_main_grad(weight):
        return parts_XAB.sum(0).t().reshape(weight.shape).to(weight.dtype)
    num_parts, num_rows, num_columns = parts_XAB.shape
    out = weight.main_grad
    out_strides = (0 if out.dim() == 1 else out.stride(-1), out.stride(0))
    _add_sums_kernel[(num_rows, triton.cdiv(num_columns, _BLOCK_B))](
        parts_XAB,
        out,
        num_parts,
        num_columns,
        *parts_XAB.stride()[:2],
        *out_strides,
        BLOCK_X=_BLOCK_X,
        BLOCK_B=_BLOCK_B,
        num_warps=4,
    )
    return mark_added(weight)
