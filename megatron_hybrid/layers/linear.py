"""Tensor-parallel linears as every layer uses them: norm + column-parallel into a block, row-parallel out of it.

Communication is megatron-core's (its region mappings carry the matching collective in backward); the product itself is an op, chosen per
host, unless ``float8`` puts another in its place. Parameter names are Megatron-LM's with its Transformer Engine layers,
``layer_norm_weight`` and ``weight`` side by side, so checkpoints are the same on every host.
"""

from __future__ import annotations

import math

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hybrid.layers.parameters import Component, declare, normal, ones
from megatron_hybrid.layers.specs import Ops


class NormColumnParallelLinear(torch.nn.Module):
    """RMSNorm, then a linear whose output rows are cut over the tensor ranks.

    The norm sees what the rank holds of the sequence; under sequence parallelism the linear gathers it.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, ops: Ops, components: tuple[Component, ...] = ()
    ) -> None:
        super().__init__()
        self.rms_norm, self.product = ops.rms_norm, ops.linear
        self.eps, self.sequence_parallel = config.layernorm_epsilon, config.sequence_parallel
        tensor_ranks = config.tensor_model_parallel_size
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size, dtype=config.params_dtype))
        self.weight = torch.nn.Parameter(torch.empty(output_size // tensor_ranks, input_size, dtype=config.params_dtype))
        declare(self.layer_norm_weight, initializer=ones, sequence_parallel=config.sequence_parallel)
        declare(self.weight, initializer=normal(config.init_method_std), tensor_ranks=tensor_ranks, axis=0, components=components)

    def forward(self, hidden_LBD: Tensor) -> Tensor:
        """Map [L or L/tp, B, input_size] to [L, B, output_size / tp]."""
        return self.product(self.normed(hidden_LBD), self.weight)

    def normed(self, hidden_LBD: Tensor) -> Tensor:
        """What the product is of: the norm, over the whole sequence, [L, B, input_size]."""
        return whole_sequence(self.rms_norm(hidden_LBD, self.layer_norm_weight, self.eps), self.sequence_parallel)


class ResidualRowParallelLinear(torch.nn.Module):
    """The linear that writes into the residual stream; its input columns are cut over the tensor ranks.

    Its initial std is scaled by 1 / sqrt(layers): one residual addition per layer of the pattern, so the variance of the stream at the end
    does not grow with depth (GPT-2's rule, whose layers add twice).
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.product, self.sequence_parallel = ops.linear, config.sequence_parallel
        tensor_ranks = config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size // tensor_ranks, dtype=config.params_dtype))
        std = config.init_method_std / math.sqrt(config.num_layers)
        declare(self.weight, initializer=normal(std), tensor_ranks=tensor_ranks, axis=1)

    def forward(self, input_LBC: Tensor) -> Tensor:
        """Map [L, B, input_size / tp] to [L or L/tp, B, output_size], summed over the tensor ranks."""
        return self.summed(self.product(input_LBC, self.weight))

    def summed(self, partial_LBD: Tensor) -> Tensor:
        """The ranks' products added up, [L or L/tp, B, output_size]."""
        group = get_tensor_model_parallel_group()
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(partial_LBD, group=group)
        return reduce_from_tensor_model_parallel_region(partial_LBD, group=group)


def whole_sequence(hidden_LBD: Tensor, sequence_parallel: bool) -> Tensor:
    """All of L on every tensor rank, [L, B, D], with a backward that sums what the ranks' output shards contribute."""
    group = get_tensor_model_parallel_group()
    if sequence_parallel:
        return gather_from_sequence_parallel_region(hidden_LBD, tensor_parallel_output_grad=True, group=group)
    return copy_to_tensor_model_parallel_region(hidden_LBD, group=group)
