"""RMSNorm as a module of its own, where no linear follows it."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hybrid.layers.parameters import declare, ones
from megatron_hybrid.layers.specs import Ops


class Norm(torch.nn.Module):
    """RMSNorm over the last dimension of the residual stream (the model's final norm)."""

    def __init__(self, size: int, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.rms_norm = ops.rms_norm
        self.eps = config.layernorm_epsilon
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype))
        declare(self.weight, initializer=ones, sequence_parallel=config.sequence_parallel)

    def forward(self, hidden_LBD: Tensor) -> Tensor:
        """Map [..., size] to [..., size]."""
        return self.rms_norm(hidden_LBD, self.weight, self.eps)
