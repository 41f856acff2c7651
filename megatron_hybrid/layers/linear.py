"""Tensor-parallel linears as every layer uses them: norm + column-parallel into a block, row-parallel out of it.

Parameter names are Megatron-LM's with its Transformer Engine layers: ``layer_norm_weight`` and ``weight`` side by side, so checkpoints are the same on every host.
"""

from __future__ import annotations

import math

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hybrid.layers.parameters import Component, declare, normal, ones
from megatron_hybrid.layers.specs import Ops


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm, then a column-parallel linear.

    The norm sees what the rank holds of the sequence; under sequence parallelism the linear gathers it.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, ops: Ops, components: tuple[Component, ...] = ()
    ) -> None:
        super().__init__(input_size, output_size, config=config, init_method=config.init_method, bias=False, gather_output=False)
        self.rms_norm = ops.rms_norm
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size, dtype=config.params_dtype, device=self.weight.device))
        declare(self.layer_norm_weight, initializer=ones, sequence_parallel=config.sequence_parallel)
        tensor_ranks = config.tensor_model_parallel_size
        declare(self.weight, initializer=normal(config.init_method_std), tensor_ranks=tensor_ranks, axis=0, components=components)

    def forward(self, hidden_LBD: Tensor) -> Tensor:
        """Map [L or L/tp, B, input_size] to [L, B, output_size / tp]."""
        normed = self.rms_norm(hidden_LBD, self.layer_norm_weight, self.config.layernorm_epsilon)
        return super().forward(normed)[0]


class ResidualRowParallelLinear(RowParallelLinear):
    """The linear that writes into the residual stream; its initial std is scaled by 1 / sqrt(layers).

    One residual addition per layer of the pattern, so the variance of the stream at the end does not grow with depth (GPT-2's rule, where a layer adds twice).
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig) -> None:
        super().__init__(input_size, output_size, config=config, init_method=config.init_method, bias=False, input_is_parallel=True, skip_bias_add=False)
        std = config.init_method_std / math.sqrt(config.num_layers)
        declare(self.weight, initializer=normal(std), tensor_ranks=config.tensor_model_parallel_size, axis=1)

    def forward(self, input_LBC: Tensor) -> Tensor:
        """Map [L, B, input_size / tp] to [L or L/tp, B, output_size], summed over the tensor ranks."""
        return super().forward(input_LBC)[0]
