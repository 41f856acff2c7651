"""Token embedding for GPUs: deterministic gradients, added straight into the weight's fp32 buffer.

torch's backward makes a whole [V, D] gradient of zeros, scatters into it and has the wrapper add it to main_grad: 7 GB of traffic for a
131,072 x 4,096 table and a few thousand tokens. Here equal tokens are brought together by a sort, and one program per different token adds
up its rows, in the order of their positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megatron_hybrid.ops.main_grad import has_main_grad, mark_added


@triton.jit
def _add_rows_kernel(
    row_ptr, position_ptr, dy_ptr, out_ptr, num_positions, num_rows, num_columns, dy_stride, out_stride, BLOCK_D: tl.constexpr
):
    index = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < num_columns
    row = tl.load(row_ptr + index)
    before = tl.load(row_ptr + index - 1, mask=index > 0, other=-1)
    is_first = (index == 0) | (before != row)
    if is_first & (row >= 0) & (row < num_rows):
        total = tl.zeros((BLOCK_D,), tl.float32)
        same = True
        while same:
            position = tl.load(position_ptr + index)
            total += tl.load(dy_ptr + position * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
            index += 1
            following = tl.load(row_ptr + index, mask=index < num_positions, other=-1)
            same = (index < num_positions) & (following == row)
        out = out_ptr + row * out_stride + columns
        tl.store(out, tl.load(out, mask=inside, other=0.0) + total, mask=inside)


def add_rows(out_VD: Tensor, rows_N: Tensor, dy_ND: Tensor) -> None:
    """Add ``dy[n]`` to ``out[rows[n]]`` for every n whose row lies in the table; fp32 sums in the order of n."""
    sorted_N, position_N = torch.sort(rows_N, stable=True)
    num_columns = dy_ND.shape[1]
    block = min(1024, triton.next_power_of_2(num_columns))
    grid = (rows_N.shape[0], triton.cdiv(num_columns, block))
    _add_rows_kernel[grid](
        sorted_N,
        position_N,
        dy_ND,
        out_VD,
        rows_N.shape[0],
        out_VD.shape[0],
        num_columns,
        dy_ND.stride(0),
        out_VD.stride(0),
        BLOCK_D=block,
        num_warps=4,
    )


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_VD: Tensor, tokens_BL: Tensor, first_row: int) -> Tensor:
        rows_BL = tokens_BL - first_row
        ctx.save_for_backward(weight_VD, rows_BL)
        owned_BL = (rows_BL >= 0) & (rows_BL < weight_VD.shape[0])
        return F.embedding(rows_BL.clamp(0, weight_VD.shape[0] - 1), weight_VD).mul_(owned_BL[..., None])

    @staticmethod
    def backward(ctx, dy_BLD: Tensor) -> tuple[Tensor, None, None]:
        weight_VD, rows_BL = ctx.saved_tensors
        dy_ND = dy_BLD.reshape(-1, dy_BLD.shape[-1])
        if has_main_grad(weight_VD):
            add_rows(weight_VD.main_grad, rows_BL.flatten(), dy_ND)
            return mark_added(weight_VD), None, None
        dweight_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
        add_rows(dweight_VD, rows_BL.flatten(), dy_ND)
        return dweight_VD.to(weight_VD.dtype), None, None


def embedding(weight_VD: Tensor, tokens_BL: Tensor, first_row: int) -> Tensor:
    """`embedding_reference` with the gradient described above, for bf16 and fp32 tables whose last axis is contiguous."""
    return _Embedding.apply(weight_VD, tokens_BL, first_row)
