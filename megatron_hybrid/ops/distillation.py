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
from megatron_hybrid.ops.linear import matmul_nt, weight_gradient


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
    wants_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight_VD.requires_grad)
    return _LinearKlDivergence.apply(
        hidden,
        weight_VD,
        teacher_hidden.detach(),
        teacher_weight_VE.detach(),
        token_weights,
        vocab_size,
        temperature,
        group,
        num_rows_per_chunk,
        wants_gradients,
    )


class _LinearKlDivergence(torch.autograd.Function):
    """Logits are formed in units of log 2, divided by the temperature: exp2 is the cheapest exponential there is."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight_VD: Tensor,
        teacher_hidden: Tensor,
        teacher_weight_VE: Tensor,
        token_weights: Tensor,
        vocab_size: int,
        temperature: float,
        group: dist.ProcessGroup | None,
        num_rows_per_chunk: int,
        wants_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        num_rows = weight_VD.shape[0]
        num_valid = max(0, min(num_rows, vocab_size - (0 if group is None else group.rank() * num_rows)))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        hidden_ND, weights_N = hidden.reshape(-1, hidden.shape[-1]), token_weights.reshape(-1).to(wide)
        teacher_NE = teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
        valid_VD, valid_VE = weight_VD[:num_valid], teacher_weight_VE[:num_valid]
        divergences_N = torch.empty(weights_N.shape, dtype=wide, device=hidden.device)
        dhidden_ND = torch.zeros_like(hidden_ND) if wants_gradients else None
        dweight_VD = torch.zeros(weight_VD.shape, dtype=wide, device=hidden.device) if wants_gradients else None
        scale = LOG2_E / temperature
        for start in range(0, weights_N.shape[0], num_rows_per_chunk):
            rows = slice(start, start + num_rows_per_chunk)
            student = _scaled_logits(hidden_ND[rows], valid_VD, scale, wide)
            teacher = _scaled_logits(teacher_NE[rows], valid_VE, scale, wide)
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
            divergences_N[rows] = (crossed / teacher_sum + student_sum.log2() - teacher_sum.log2()) / LOG2_E
            if wants_gradients and num_valid:
                per_token = weights_N[rows] / temperature
                gradient = student_exp.mul_((per_token / student_sum)[:, None])
                gradient.addcmul_(teacher_exp, (per_token / teacher_sum)[:, None], value=-1)
                gradient = gradient.to(hidden.dtype)
                dhidden_ND[rows] = matmul_nt(gradient, valid_VD.t())
                dweight_VD[:num_valid] += weight_gradient(gradient, hidden_ND[rows])
        if wants_gradients:
            ctx.save_for_backward(dhidden_ND.view(hidden.shape), dweight_VD.to(weight_VD.dtype))
        divergences = divergences_N.view(token_weights.shape)
        ctx.mark_non_differentiable(divergences)
        return (divergences_N * weights_N).sum(), divergences

    @staticmethod
    def backward(ctx, dsum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight_VD = ctx.saved_tensors
        return (dhidden * dsum).to(dhidden.dtype), (dweight_VD * dsum).to(dweight_VD.dtype), *(None,) * 8


def check_arguments(weight_VD: Tensor, teacher_weight_VE: Tensor, temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if weight_VD.shape[0] != teacher_weight_VE.shape[0]:
        raise ValueError(
            f"student and teacher must have the same (padded) vocabulary, but this rank holds {weight_VD.shape[0]} and "
            f"{teacher_weight_VE.shape[0]} rows; pad both alike (vocab_divisible_by)"
        )


def _scaled_logits(hidden_ND: Tensor, weight_VD: Tensor, scale: float, wide: torch.dtype) -> Tensor:
    if not weight_VD.shape[0]:
        return hidden_ND.new_zeros(hidden_ND.shape[0], 0, dtype=wide)
    return matmul_nt(hidden_ND, weight_VD).to(wide).mul_(scale)


def _maxima(student: Tensor, teacher: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The largest logit of each row over the whole vocabulary, of student and teacher in one reduction: [2, rows]."""
    if student.shape[-1]:
        maxima = torch.stack((student.amax(-1), teacher.amax(-1)))
    else:
        maxima = student.new_full((2, student.shape[0]), float("-inf"))
    if group is not None and group.size() > 1:
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
    return maxima
