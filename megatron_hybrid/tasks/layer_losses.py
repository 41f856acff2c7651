"""Distillation between layers: the student's residual stream after some of its layers, compared with the teacher's after theirs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.config import ModelConfig, ParallelConfig
from megatron_hybrid.ops.hidden_states import HIDDEN_STATE_LOSSES


@dataclass(frozen=True)
class LayerPair:
    """A layer of the student and the teacher's that it is compared with, numbered from 0 through each model."""

    student: int
    teacher: int
    weight: float = 1.0
    """Relative to the other pairs'."""


@dataclass(frozen=True)
class LayerLossOptions:
    """What is compared, how, and how much it counts."""

    pairs: tuple[LayerPair, ...]
    kind: Literal["mse", "cosine"] = "cosine"
    """mse: mean squared difference over the width. cosine: 1 - cosine, blind to length."""
    weight: float = 1.0
    """Of the pairs' weighted mean, beside the distillation loss."""


def check_layer_losses(options: LayerLossOptions, student: ModelConfig, teacher: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse pairs that there are not, or that cannot be compared in a layout.

    Raises:
        ValueError: no pairs, a layer that a model does not have, a weight that is not positive, streams of different widths, or pipeline
            stages.
    """
    if not options.pairs:
        raise ValueError("a layer loss without pairs of layers has nothing to compare; name some, or drop it")
    for pair in options.pairs:
        for name, layer, model in (("student", pair.student, student), ("teacher", pair.teacher, teacher)):
            if not 0 <= layer < model.num_layers:
                raise ValueError(f"a layer loss names layer {layer} of the {name}, which has layers 0 to {model.num_layers - 1}; change it")
    weights = [options.weight, *(pair.weight for pair in options.pairs)]
    if not min(weights) > 0:
        raise ValueError(f"weights of a layer loss must be above 0, got {min(weights)}; leave out what shall not count")
    if student.hidden_size != teacher.hidden_size:
        raise ValueError(
            f"a layer loss compares residual streams, but the teacher's is {teacher.hidden_size} wide and the student's "
            f"{student.hidden_size}; drop it, or keep the width"
        )
    if parallel.pipeline > 1:
        raise ValueError(
            f"a layer loss needs parallel.pipeline=1, got {parallel.pipeline}: losses are made on the last stage, where the streams of "
            "earlier stages' layers are not, and the two models' stages need not hold the same pairs; use tensor ranks, or drop it"
        )


class StreamTap:
    """Keeps the residual stream after certain layers while a stack runs (its ``after_layer``)."""

    def __init__(self, layers: Iterable[int]) -> None:
        self._wanted = frozenset(layers)
        self.streams: dict[int, Tensor] = {}

    def __call__(self, layer: int, hidden_LBD: Tensor) -> None:
        """Take the stream after a layer, numbered through the whole model."""
        if layer in self._wanted:
            self.streams[layer] = hidden_LBD


def layer_loss(
    options: LayerLossOptions,
    student: dict[int, Tensor],
    teacher: dict[int, Tensor],
    token_weights_LB: Tensor,
    group: dist.ProcessGroup,
    sequence_parallel: bool,
) -> Tensor:
    """Return the weighted mean over pairs, summed over tokens with their weights; an fp32 scalar, the same on every tensor rank.

    A rank's gradient is that of the streams it holds: under sequence parallelism of its part of the sequence, otherwise of all of it, as
    every rank has it. Nothing is to be summed over the ranks, because the streams themselves are what the ranks share.

    Args:
        options: pairs, kind and weights; ``weight`` itself is left to the caller.
        student: layer -> stream [L or L/tp, B, D].
        teacher: the same of the teacher; gets no gradient.
        token_weights_LB: weight of every token of the whole sequence.
        group: the tensor ranks.
        sequence_parallel: whether streams are cut along the sequence over them.
    """
    if sequence_parallel:
        token_weights_LB = token_weights_LB.chunk(group.size())[group.rank()]
    distance, total_weight = HIDDEN_STATE_LOSSES[options.kind], sum(pair.weight for pair in options.pairs)
    own = torch.stack(
        [
            pair.weight / total_weight * (distance(student[pair.student], teacher[pair.teacher]) * token_weights_LB).sum()
            for pair in options.pairs
        ]
    ).sum()
    if not sequence_parallel:
        return own
    whole = own.detach().clone()
    dist.all_reduce(whole, group=group)
    return own + (whole - own.detach())
