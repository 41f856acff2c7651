"""Adaptor heads: from the student's tokens to each teacher's space (RADIO's "v2" MLP).

Parameter names inside a head are those of RADIO's checkpoints: ``fc1``, ``blocks.N.0`` (norm) and ``.2`` (linear), ``final.0`` and ``.2``.
Heads are whole on every tensor rank, which computes them on all tokens: a head's norm spans its inner width, so a cut over it would have to
communicate inside the head, for a few percent of the student's work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hybrid.layers.parameters import declare, normal, ones
from vision_agglom.students.layers import zeros
from vision_agglom.students.ops import VisionOps
from vision_agglom.targets.standardizers import Turn

_NORM_EPS = 1e-5
"""torch.nn.LayerNorm's, which readers of exported heads build."""


@dataclass(frozen=True)
class HeadShape:
    """The heads of one teacher."""

    name: str
    summary_channels: int | None
    """None: no summary head."""
    spatial_channels: int
    hidden_size: int
    num_inner: int


class Linear(torch.nn.Module):
    """A linear with bias, whole on every rank."""

    def __init__(self, input_size: int, output_size: int, config: TransformerConfig, ops: VisionOps) -> None:
        super().__init__()
        self.product = ops.biased_linear
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.empty(output_size, dtype=config.params_dtype))
        declare(self.weight, initializer=normal(config.init_method_std))
        declare(self.bias, initializer=zeros)

    def forward(self, x: Tensor, turn: Turn | None = None) -> Tensor:
        """Map [..., input_size] to [..., output_size], turned into another space where one is given."""
        weight, bias = (self.weight, self.bias) if turn is None else turn.fold(self.weight, self.bias)
        return self.product(x, weight, bias)


class LayerNorm(torch.nn.Module):
    """LayerNorm over the last axis."""

    def __init__(self, size: int, config: TransformerConfig, ops: VisionOps) -> None:
        super().__init__()
        self.layer_norm = ops.layer_norm
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype))
        declare(self.weight, initializer=ones)
        declare(self.bias, initializer=zeros)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., size] to [..., size]."""
        return self.layer_norm(x, self.weight, self.bias, _NORM_EPS)


class AdaptorHead(torch.nn.Module):
    """fc1, residual blocks of (norm, GELU, linear), final (norm, GELU, linear)."""

    def __init__(
        self, input_size: int, hidden_size: int, output_size: int, num_inner: int, config: TransformerConfig, ops: VisionOps
    ) -> None:
        super().__init__()
        shared = (config, ops)
        self.fc1 = Linear(input_size, hidden_size, *shared)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(LayerNorm(hidden_size, *shared), torch.nn.GELU(), Linear(hidden_size, hidden_size, *shared))
            for _ in range(num_inner)
        )
        self.final = torch.nn.Sequential(LayerNorm(hidden_size, *shared), torch.nn.GELU(), Linear(hidden_size, output_size, *shared))

    def forward(self, x: Tensor, turn: Turn | None = None) -> Tensor:
        """Map [..., input_size] to [..., output_size], turned into another space where one is given."""
        x = self.fc1(x)
        for block in self.blocks:
            x = x + block(x)
        norm, activation, last = self.final
        return last(activation(norm(x)), turn)


class TeacherHeads(torch.nn.Module):
    """All teachers' heads, and the learned log-variances of uncertainty balancing."""

    def __init__(
        self, shapes: Sequence[HeadShape], input_size: int, config: TransformerConfig, ops: VisionOps, *, num_uncertainties: int = 0
    ) -> None:
        super().__init__()
        self.log_variances: torch.nn.Parameter | None = None
        if num_uncertainties:
            self.log_variances = torch.nn.Parameter(torch.empty(num_uncertainties, dtype=config.params_dtype))
            declare(self.log_variances, initializer=zeros)
        self.summary, self.spatial = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        for shape in shapes:
            inner = (shape.hidden_size, shape.num_inner)
            self.spatial[shape.name] = AdaptorHead(input_size, inner[0], shape.spatial_channels, inner[1], config, ops)
            if shape.summary_channels is not None:
                self.summary[shape.name] = AdaptorHead(input_size, inner[0], shape.summary_channels, inner[1], config, ops)

    def parameters_without(self, names: Iterable[str]) -> list[torch.nn.Parameter]:
        """Parameters of the heads of all other teachers."""
        kept = set(names)
        heads = [head for group in (self.summary, self.spatial) for name, head in group.items() if name not in kept]
        return [parameter for head in heads for parameter in head.parameters()]


class _GiveZeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def give_zero_gradients(value: Tensor, parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """``value``, with a graph that gives ``parameters`` gradients of zero: for heads of teachers that a partition leaves out.

    Data-parallel reductions wait for every parameter. Saying which ones are absent keeps that check for all others.
    """
    return _GiveZeros.apply(value, *parameters) if parameters else value
