"""Distillation loss between two language models, with both vocabularies split over tensor-parallel ranks, fused with the output layers.

Forward Kullback-Leibler divergence per token (Hinton et al. 2015), of teacher logits t and student logits s at temperature T:

    KL = sum over v of p(v) (log p(v) - log q(v)),   p = softmax(t / T),  q = softmax(s / T)

not multiplied by T^2. Its gradient is (q - p) / T with respect to s. Shards, padding rows and the order of reductions are as in
``cross_entropy``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.ops.cross_entropy import LOG2_E
from megatron_hybrid.ops.linear_loss import chunked_linear_loss, scaled_logits


def linear_kl_divergence_reference(
    hidden: Tensor,
    weight_VD: Tensor,
    teacher_hidden: Tensor,
    teacher_weight_VE: Tensor,
    token_weights: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`sum(token_weights * KL)` for an undivided vocabulary, and the unweighted KL of every token, which carries no gradient.

    hidden [..., D] and teacher_hidden [..., E] may have different widths; token_weights [...]. Only hidden and weight_VD get gradients.
    Every implementation named "linear_kl_divergence" takes these arguments and returns this pair, both fp32 (fp64 for fp64).
    Raises ValueError for a temperature that is not positive, different vocabularies, or a group of more than one rank.
    """
    check_arguments(weight_VD, teacher_weight_VE, temperature)
    if group is not None and group.size() > 1:
        raise ValueError(f'the reference needs the whole vocabulary on one rank, but the group has {group.size()}; choose "cpu"')
    wide = torch.promote_types(hidden.dtype, torch.float32)
    student_logits = (hidden @ weight_VD.t())[..., :vocab_size].to(wide) / temperature
    teacher_logits = (teacher_hidden @ teacher_weight_VE.t())[..., :vocab_size].to(wide).detach() / temperature
    log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    divergences = (log_p.exp() * (log_p - log_q)).sum(-1)
    return (divergences * token_weights).sum(), divergences.detach()


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
    num_rows_per_chunk: int = 512,
) -> tuple[Tensor, Tensor]:
    """`linear_kl_divergence_reference` that holds both models' logits of `num_rows_per_chunk` tokens only, and never gathers them.

    Both gradients are formed in the forward, while the logits are there. With a group, each weight is this rank's shard (rows of the same
    words in both), the loss is whole on every rank, and the gradient of `hidden` is this rank's summand, as in `linear_cross_entropy`.
    Raises ValueError for a temperature that is not positive, or shards of different vocabularies.
    """
    check_arguments(weight_VD, teacher_weight_VE, temperature)
    num_rows = weight_VD.shape[0]
    num_valid = max(0, min(num_rows, vocab_size - (0 if group is None else group.rank() * num_rows)))
    teacher_NE, valid_VE = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]), teacher_weight_VE.detach()[:num_valid]
    # In units of log 2, divided by the temperature: exp2 is the cheapest exponential there is.
    scale = LOG2_E / temperature

    def chunk_loss(rows: slice, student: Tensor, weights_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
        teacher = scaled_logits(teacher_NE[rows], valid_VE, scale)
        student_max, teacher_max = _maxima(student, teacher, group)
        student -= student_max[:, None]
        teacher -= teacher_max[:, None]
        teacher_exp = teacher.exp2()
        # sum of exp(t) (t - s); the terms of the two denominators follow once these are known.
        crossed = (teacher_exp * teacher.sub_(student)).sum(-1)
        student_exp = student.exp2_()
        sums = torch.stack((student_exp.sum(-1), teacher_exp.sum(-1), crossed))
        if group is not None and group.size() > 1:
            dist.all_reduce(sums, group=group)
        student_sum, teacher_sum, crossed = sums
        divergences_N = (crossed / teacher_sum + student_sum.log2() - teacher_sum.log2()) / LOG2_E
        if weights_N is None:
            return divergences_N, None
        per_token = weights_N / temperature
        gradient = student_exp.mul_((per_token / student_sum)[:, None])
        return divergences_N, gradient.addcmul_(teacher_exp, (per_token / teacher_sum)[:, None], value=-1)

    return chunked_linear_loss(
        hidden, weight_VD, token_weights, chunk_loss, num_valid=num_valid, scale=scale, num_rows_per_chunk=num_rows_per_chunk
    )


def check_arguments(weight_VD: Tensor, teacher_weight_VE: Tensor, temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if weight_VD.shape[0] != teacher_weight_VE.shape[0]:
        raise ValueError(
            f"student and teacher must have the same (padded) vocabulary, but this rank holds {weight_VD.shape[0]} and "
            f"{teacher_weight_VE.shape[0]} rows; pad both alike (vocab_divisible_by)"
        )


def _maxima(student: Tensor, teacher: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The largest logit of each row over the whole vocabulary, of student and teacher in one reduction: [2, rows]."""
    if student.shape[-1]:
        maxima = torch.stack((student.amax(-1), teacher.amax(-1)))
    else:
        maxima = student.new_full((2, student.shape[0]), float("-inf"))
    if group is not None and group.size() > 1:
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
    return maxima
