"""The MLP layer: squared ReLU (So et al. 2021), not gated, tensor-parallel over the inner width."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.fp8.mlp import float8_mlp
from megatron_hybrid.layers.float8 import runs_in_float8
from megatron_hybrid.layers.linear import NormColumnParallelLinear, ResidualRowParallelLinear
from megatron_hybrid.layers.recompute import recompute_between
from megatron_hybrid.layers.sequence import Sequence
from megatron_hybrid.layers.specs import Ops


class MlpLayer(torch.nn.Module):
    """hidden + mlp(hidden)."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, ops: Ops, *, recompute_core: bool) -> None:
        super().__init__()
        self.mlp = Mlp(model, config, ops, recompute_core=recompute_core)

    def forward(self, hidden_LBD: Tensor, sequence: Sequence, cache: None = None) -> Tensor:
        """Map [L or L/tp, B, D] to the same shape. Tokens do not meet here: there is nothing to cache, and ``sequence`` is not read."""
        return hidden_LBD + self.mlp(hidden_LBD)


class Mlp(torch.nn.Module):
    """linear_fc2(relu(linear_fc1(norm(hidden))) ** 2)."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, ops: Ops, *, recompute_core: bool) -> None:
        super().__init__()
        self.squared_relu, self.recompute_core = ops.squared_relu, recompute_core
        self.linear_fc1 = NormColumnParallelLinear(model.hidden_size, model.ffn_hidden_size, config=config, ops=ops)
        self.linear_fc2 = ResidualRowParallelLinear(model.ffn_hidden_size, model.hidden_size, config=config, ops=ops)

    def forward(self, hidden_LBD: Tensor) -> Tensor:
        """Map [L or L/tp, B, D] to the same shape, summed over the tensor ranks."""
        return self.linear_fc2.summed(self._core(self.linear_fc1.normed(hidden_LBD)))

    def _core(self, normed_LBD: Tensor) -> Tensor:
        """What happens between the ranks' exchanges: [L, B, D] to this rank's summand of the result."""
        fc1, fc2 = self.linear_fc1, self.linear_fc2
        recompute = self.recompute_core and self.training
        if runs_in_float8(fc1.product) and runs_in_float8(fc2.product):
            return float8_mlp(normed_LBD, fc1.weight, fc2.weight, fc1.product, fc2.product, recompute=recompute)
        inner_LBF = fc1.product(normed_LBD, fc1.weight)
        if not recompute:
            return fc2.product(self.squared_relu(inner_LBF), fc2.weight)
        return recompute_between(self.squared_relu, lambda activated_LBF: fc2.product(activated_LBF, fc2.weight), inner_LBF)
