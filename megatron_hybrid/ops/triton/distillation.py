"""Output layer and distillation loss for GPUs (`linear_loss`): the student's logits turned into their gradient in place.

One pass over each pair of rows for their maxima and sums and for sum p (t - s), one that overwrites the student's row with
weight / T * (q - p). With a divided vocabulary the ranks agree on the rows' sums between the two.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megatron_hybrid.ops.cross_entropy import LOG2_E
from megatron_hybrid.ops.distillation import check_arguments
from megatron_hybrid.ops.triton.linear_loss import chunked_linear_loss

_BLOCK_V = 8192
_NUM_WARPS = 16


@triton.jit
def _statistics_kernel(student_ptr, teacher_ptr, statistics_ptr, scale, num_valid, row_stride, num_rows, BLOCK_V: tl.constexpr):
    """This rank's part of one token's statistics, of logits s and t times ``scale``: max s, max t, sum 2^(s - max s), sum 2^(t - max t),
    sum 2^(t - max t) (t - s)."""
    row = tl.program_id(0).to(tl.int64)
    student_max = float("-inf")
    teacher_max = float("-inf")
    student_sum = 0.0
    teacher_sum = 0.0
    crossed = 0.0
    for start in range(0, num_valid, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        mask = column < num_valid
        student = tl.load(student_ptr + row * row_stride + column, mask=mask, other=float("-inf")).to(tl.float32) * scale
        teacher = tl.load(teacher_ptr + row * row_stride + column, mask=mask, other=float("-inf")).to(tl.float32) * scale
        higher = tl.maximum(student_max, tl.max(student, 0))
        student_sum = student_sum * tl.exp2(student_max - higher) + tl.sum(tl.exp2(student - higher), 0)
        student_max = higher
        higher = tl.maximum(teacher_max, tl.max(teacher, 0))
        shrink = tl.exp2(teacher_max - higher)
        exponentials = tl.exp2(teacher - higher)
        teacher_sum = teacher_sum * shrink + tl.sum(exponentials, 0)
        crossed = crossed * shrink + tl.sum(tl.where(mask, exponentials * (teacher - student), 0.0), 0)
        teacher_max = higher
    tl.store(statistics_ptr + row, student_max)
    tl.store(statistics_ptr + num_rows + row, teacher_max)
    tl.store(statistics_ptr + 2 * num_rows + row, student_sum)
    tl.store(statistics_ptr + 3 * num_rows + row, teacher_sum)
    tl.store(statistics_ptr + 4 * num_rows + row, crossed)


@triton.jit
def _gradient_kernel(
    student_ptr,
    teacher_ptr,
    factor_ptr,
    student_log2_ptr,
    teacher_log2_ptr,
    scale,
    num_valid,
    num_columns,
    row_stride,
    BLOCK_V: tl.constexpr,
):
    """Overwrite a row of the student's logits with factor * (q - p); padding gets zero."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row)
    student_log2, teacher_log2 = tl.load(student_log2_ptr + row), tl.load(teacher_log2_ptr + row)
    for start in range(0, num_columns, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        mask = column < num_valid
        place = student_ptr + row * row_stride + column
        student = tl.load(place, mask=mask, other=float("-inf")).to(tl.float32) * scale
        teacher = tl.load(teacher_ptr + row * row_stride + column, mask=mask, other=float("-inf")).to(tl.float32) * scale
        gradient = factor * (tl.exp2(student - student_log2) - tl.exp2(teacher - teacher_log2))
        tl.store(place, gradient.to(student_ptr.dtype.element_ty), mask=column < num_columns)


def _divergence_and_gradient(
    student_NV: Tensor,
    teacher_NV: Tensor,
    weights_N: Tensor | None,
    vocab_size: int,
    temperature: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Each token's divergence, fp32; with weights, the student's logits are overwritten with their gradient."""
    num_rows, num_columns = student_NV.shape
    divided = group is not None and group.size() > 1
    num_valid = max(0, min(num_columns, vocab_size - (group.rank() * num_columns if divided else 0)))
    scale = LOG2_E / temperature
    constants = {"BLOCK_V": min(_BLOCK_V, triton.next_power_of_2(num_columns)), "num_warps": _NUM_WARPS}
    statistics_5N = torch.empty(5, num_rows, dtype=torch.float32, device=student_NV.device)
    _statistics_kernel[(num_rows,)](student_NV, teacher_NV, statistics_5N, scale, num_valid, student_NV.stride(0), num_rows, **constants)
    maxima_2N, sums_3N = statistics_5N[:2], statistics_5N[2:]
    if divided:
        own_maxima_2N = maxima_2N.clone()
        dist.all_reduce(maxima_2N, op=dist.ReduceOp.MAX, group=group)
        shrink_2N = torch.exp2(own_maxima_2N - maxima_2N)
        sums_3N.mul_(shrink_2N[[0, 1, 1]])
        dist.all_reduce(sums_3N, group=group)
    student_log2_N, teacher_log2_N = maxima_2N + sums_3N[:2].log2()
    if weights_N is not None:
        _gradient_kernel[(num_rows,)](
            student_NV,
            teacher_NV,
            weights_N / temperature,
            student_log2_N,
            teacher_log2_N,
            scale,
            num_valid,
            num_columns,
            student_NV.stride(0),
            **constants,
        )
    return (sums_3N[2] / sums_3N[1] + student_log2_N - teacher_log2_N) / LOG2_E


def linear_kl_divergence(
    hidden: Tensor,
    weight_VD: Tensor,
    teacher_hidden: Tensor,
    teacher_weight_VE: Tensor,
    token_weights: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    num_rows_per_chunk: int = 2048,
) -> tuple[Tensor, Tensor]:
    """`linear_kl_divergence_reference`, both gradients formed in the forward pass.

    With a group, see the "cpu" version; with a ``main_grad``, `chunked_linear_loss`.
    Raises ValueError for a temperature that is not positive, or shards of different vocabularies.
    """
    check_arguments(weight_VD, teacher_weight_VE, temperature)
    teacher_NE, teacher_weight_VE = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]), teacher_weight_VE.detach()

    def chunk_loss(rows: slice, logits_NV: Tensor, weights_N: Tensor | None) -> Tensor:
        teacher_NV = teacher_NE[rows] @ teacher_weight_VE.t()
        return _divergence_and_gradient(logits_NV, teacher_NV, weights_N, vocab_size, temperature, group)

    return chunked_linear_loss(hidden, weight_VD, token_weights, chunk_loss, num_rows_per_chunk=num_rows_per_chunk)
