"""Next-token cross entropy fused with the output layer, with the vocabulary split over tensor-parallel ranks.

Rank r of `group` holds the vocabulary rows [r V_local, (r + 1) V_local) (Shoeybi et al. 2019, "Megatron-LM", section 3). Rows at or beyond
`vocab_size` are padding: they get no probability and no gradient. Reductions run in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.ops.linear_loss import chunked_linear_loss

LOG2_E = 1.4426950408889634


def cross_entropy_reference(logits: Tensor, labels: Tensor, *, vocab_size: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """`-log softmax(logits[..., :vocab_size])[label]` per token, fp32 (fp64 for fp64), for an undivided vocabulary.

    logits [..., V] with V >= vocab_size, labels [...] int64 in [0, vocab_size).
    Raises ValueError for a label outside, or a group of more than one rank.
    """
    check_labels(labels, vocab_size)
    if _world_size(group) > 1:
        raise ValueError(f'the reference needs the whole vocabulary on one rank, but the group has {_world_size(group)}; choose "cpu"')
    valid = logits[..., :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(valid.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`sum(token_weights * cross_entropy(hidden @ weight.T, labels))` and the unweighted per-token losses, which carry no gradient.

    hidden [..., D], labels and token_weights [...]; see `cross_entropy_reference`. The weights (loss mask, or mask over its sum) enter
    here so that an implementation may form the gradients while it holds the logits. Every implementation named "linear_cross_entropy"
    takes these arguments and returns this pair, both fp32 (fp64 for fp64).
    """
    losses = cross_entropy_reference(hidden @ weight_VD.t(), labels, vocab_size=vocab_size, group=group)
    return (losses * token_weights).sum(), losses.detach()


def linear_cross_entropy(
    hidden: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    num_rows_per_chunk: int = 512,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy_reference` that holds the logits of `num_rows_per_chunk` tokens only and forms both gradients in the forward.

    With a group, `weight_VD` is this rank's shard, the loss is whole on every rank, and the gradient of `hidden` is this rank's summand: as
    with any column-parallel layer the caller's copy or gather in front of it sums the ranks. `token_weights` gets no gradient.
    Raises ValueError for a label outside [0, vocab_size).
    """
    check_labels(labels, vocab_size)
    first, num_valid = _owned_rows(weight_VD.shape[0], vocab_size, group)
    labels_N = labels.reshape(-1)

    def chunk_loss(rows: slice, logits_NV: Tensor, weights_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
        maximum = _maximum(logits_NV, group)
        row, owned = _local_labels(labels_N[rows], first, num_valid)
        label_logit = _label_logits(logits_NV, row, owned) if num_valid else torch.zeros_like(maximum)
        exponentials = logits_NV.sub_(maximum[:, None]).exp2_()
        total, label_logit = _sum_over(torch.stack((exponentials.sum(-1), label_logit)), group)
        losses_N = (maximum + total.log2() - label_logit) / LOG2_E
        if weights_N is None:
            return losses_N, None
        gradient = exponentials.mul_((weights_N / total)[:, None])
        return losses_N, gradient.scatter_add_(-1, row[:, None], torch.where(owned, -weights_N, 0)[:, None])

    # In units of log 2: exp2 is the cheapest exponential there is.
    return chunked_linear_loss(
        hidden, weight_VD, token_weights, chunk_loss, num_valid=num_valid, scale=LOG2_E, num_rows_per_chunk=num_rows_per_chunk
    )


def check_labels(labels: Tensor, vocab_size: int) -> None:
    if labels.is_cuda:
        # Asked on the device: reading the answer would make the host wait for every micro-batch.
        torch._assert_async(((labels >= 0) & (labels < vocab_size)).all(), f"labels must lie in [0, {vocab_size})")
    elif labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < vocab_size:
        raise ValueError(
            f"labels must lie in [0, {vocab_size}), got {int(labels.min())} to {int(labels.max())}; "
            "give ignored positions any valid label and weight zero"
        )


def _world_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def _owned_rows(num_rows: int, vocab_size: int, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """First vocabulary id of this rank's shard, and how many of its `num_rows` rows are real words."""
    first = 0 if group is None else group.rank() * num_rows
    return first, max(0, min(num_rows, vocab_size - first))


def _maximum(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    maximum = logits.amax(-1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], float("-inf"))
    if _world_size(group) > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    return maximum


def _local_labels(labels: Tensor, first: int, num_valid: int) -> tuple[Tensor, Tensor]:
    """Each label's row in this shard (some valid row where it lives elsewhere), and whether it lives here."""
    owned = (labels >= first) & (labels < first + num_valid)
    return (labels - first).clamp(0, max(num_valid - 1, 0)), owned


def _label_logits(logits: Tensor, row: Tensor, owned: Tensor) -> Tensor:
    return logits.gather(-1, row[..., None]).squeeze(-1).masked_fill(~owned, 0)


def _sum_over(values: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    if _world_size(group) > 1:
        dist.all_reduce(values, group=group)
    return values.unbind(0)
