"""Output layer and cross-entropy for GPUs (`linear_loss`): a chunk's logits turned into their own gradient in place by one kernel.

One pass over each row for its maximum and sum of exponentials, one that overwrites the row with weight * (softmax - one_hot). With a
divided vocabulary the two passes are two kernels, and the ranks agree on the rows' sums between them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megatron_hybrid.ops.cross_entropy import LOG2_E, check_labels
from megatron_hybrid.ops.triton.linear_loss import chunked_linear_loss

_BLOCK_V = 8192
_NUM_WARPS = 16


@triton.jit
def _log2_sum(row_ptr, num_valid, LOG2_E: tl.constexpr, BLOCK_V: tl.constexpr):
    """Maximum of a row in units of log 2, and the sum of 2^(logit - maximum)."""
    maximum = float("-inf")
    total = 0.0
    for start in range(0, num_valid, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        logit = tl.load(row_ptr + column, mask=column < num_valid, other=float("-inf")).to(tl.float32) * LOG2_E
        higher = tl.maximum(maximum, tl.max(logit, 0))
        total = total * tl.exp2(maximum - higher) + tl.sum(tl.exp2(logit - higher), 0)
        maximum = higher
    return maximum, total


@triton.jit
def _write_gradient(row_ptr, label, weight, log2_total, num_valid, num_columns, LOG2_E: tl.constexpr, BLOCK_V: tl.constexpr):
    """Overwrite a row of logits with weight * (softmax - one_hot(label)); padding gets zero."""
    for start in range(0, num_columns, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        logit = tl.load(row_ptr + column, mask=column < num_valid, other=float("-inf")).to(tl.float32) * LOG2_E
        gradient = weight * (tl.exp2(logit - log2_total) - tl.where(column == label, 1.0, 0.0))
        tl.store(row_ptr + column, gradient.to(row_ptr.dtype.element_ty), mask=column < num_columns)


@triton.jit
def _loss_kernel(
    logits_ptr,
    label_ptr,
    weight_ptr,
    loss_ptr,
    first,
    num_valid,
    num_columns,
    row_stride,
    WANTS_GRADIENT: tl.constexpr,
    LOG2_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Loss of one token, and the gradient over its logits, for an undivided vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    label = tl.load(label_ptr + row) - first
    maximum, total = _log2_sum(row_ptr, num_valid, LOG2_E, BLOCK_V)
    log2_total = maximum + tl.log2(total)
    label_logit = tl.load(row_ptr + label).to(tl.float32) * LOG2_E
    tl.store(loss_ptr + row, (log2_total - label_logit) / LOG2_E)
    if WANTS_GRADIENT:
        # Every thread has read the label's logit before any overwrites the row.
        tl.debug_barrier()
        _write_gradient(row_ptr, label, tl.load(weight_ptr + row), log2_total, num_valid, num_columns, LOG2_E, BLOCK_V)


@triton.jit
def _statistics_kernel(
    logits_ptr, label_ptr, statistics_ptr, first, num_valid, row_stride, num_rows, LOG2_E: tl.constexpr, BLOCK_V: tl.constexpr
):
    """This rank's maximum, sum and label logit (zero where the label lives elsewhere) of one token, in units of log 2."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    label = tl.load(label_ptr + row) - first
    owned = (label >= 0) & (label < num_valid)
    maximum, total = _log2_sum(row_ptr, num_valid, LOG2_E, BLOCK_V)
    tl.store(statistics_ptr + row, maximum)
    tl.store(statistics_ptr + num_rows + row, total)
    tl.store(statistics_ptr + 2 * num_rows + row, tl.load(row_ptr + label, mask=owned, other=0.0).to(tl.float32) * LOG2_E)


@triton.jit
def _gradient_kernel(
    logits_ptr,
    label_ptr,
    weight_ptr,
    log2_total_ptr,
    first,
    num_valid,
    num_columns,
    row_stride,
    LOG2_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row) - first
    weight, log2_total = tl.load(weight_ptr + row), tl.load(log2_total_ptr + row)
    _write_gradient(logits_ptr + row * row_stride, label, weight, log2_total, num_valid, num_columns, LOG2_E, BLOCK_V)


def _loss_and_gradient(
    logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor | None, vocab_size: int, group: dist.ProcessGroup | None
) -> Tensor:
    """Each token's loss, fp32; with weights, the logits are overwritten with their gradient."""
    num_rows, num_columns = logits_NV.shape
    divided = group is not None and group.size() > 1
    first = group.rank() * num_columns if divided else 0
    num_valid = max(0, min(num_columns, vocab_size - first))
    constants = {"LOG2_E": LOG2_E, "BLOCK_V": min(_BLOCK_V, triton.next_power_of_2(num_columns)), "num_warps": _NUM_WARPS}
    if not divided:
        losses_N = torch.empty(num_rows, dtype=torch.float32, device=logits_NV.device)
        _loss_kernel[(num_rows,)](
            logits_NV,
            labels_N,
            weights_N,
            losses_N,
            first,
            num_valid,
            num_columns,
            logits_NV.stride(0),
            WANTS_GRADIENT=weights_N is not None,
            **constants,
        )
        return losses_N
    statistics_3N = torch.empty(3, num_rows, dtype=torch.float32, device=logits_NV.device)
    _statistics_kernel[(num_rows,)](logits_NV, labels_N, statistics_3N, first, num_valid, logits_NV.stride(0), num_rows, **constants)
    own_maximum_N, total_N, _ = statistics_3N
    maximum_N = own_maximum_N.clone()
    dist.all_reduce(maximum_N, op=dist.ReduceOp.MAX, group=group)
    total_N.mul_(torch.exp2(own_maximum_N - maximum_N))
    dist.all_reduce(statistics_3N[1:], group=group)
    _, total_N, label_logit_N = statistics_3N
    log2_total_N = maximum_N + total_N.log2()
    if weights_N is not None:
        _gradient_kernel[(num_rows,)](
            logits_NV, labels_N, weights_N, log2_total_N, first, num_valid, num_columns, logits_NV.stride(0), **constants
        )
    return (log2_total_N - label_logit_N) / LOG2_E


def linear_cross_entropy(
    hidden: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    num_rows_per_chunk: int = 4096,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy_reference`, both gradients formed in the forward pass.

    With a group, see the "cpu" version; with a ``main_grad``, `chunked_linear_loss`.
    Raises ValueError for a label outside [0, vocab_size).
    """
    check_labels(labels, vocab_size)
    labels_N = labels.reshape(-1)

    def chunk_loss(rows: slice, logits_NV: Tensor, weights_N: Tensor | None) -> Tensor:
        return _loss_and_gradient(logits_NV, labels_N[rows], weights_N, vocab_size, group)

    return chunked_linear_loss(hidden, weight_VD, token_weights, chunk_loss, num_rows_per_chunk=num_rows_per_chunk)
