"""A run of hybrid layers: the part of the model one pipeline stage (or one virtual stage) holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Items
from typing import Literal

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.layers.attention import AttentionLayer
from megatron_hybrid.layers.mamba import MambaLayer
from megatron_hybrid.layers.mlp import MlpLayer
from megatron_hybrid.layers.norm import Norm
from megatron_hybrid.layers.sequence import Sequence
from megatron_hybrid.layers.specs import Ops

_LAYERS = {"M": MambaLayer, "*": AttentionLayer, "-": MlpLayer}


class HybridStack(torch.nn.Module):
    """Layers ``first`` to ``end`` (exclusive, counted through the whole model), and the final norm after the last."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        ops: Ops,
        *,
        layer_range: tuple[int, int],
        recompute: Literal["none", "selective", "full"],
        has_final_norm: bool,
    ) -> None:
        super().__init__()
        self.first_layer, end = layer_range
        self.recompute_layers = recompute == "full"
        kinds = model.layer_kinds[self.first_layer : end]
        self.layers = torch.nn.ModuleList(
            _LAYERS[kind](model.of_layer(number), config, ops, recompute_core=recompute == "selective")
            for number, kind in enumerate(kinds, self.first_layer)
        )
        self.final_norm = Norm(model.hidden_size, config, ops) if has_final_norm else None

    def forward(
        self,
        hidden_LBD: Tensor,
        sequence: Sequence,
        caches: Items[object] | None = None,
        after_layer: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Run the layers over [L, B, D] (the rank's part of L under sequence parallelism).

        Args:
            hidden_LBD: the residual stream.
            sequence: what the layers share about the sequence.
            caches: one cache per layer of this stack for generation, None while training.
            after_layer: told each layer's number in the whole model, and the residual stream after it.
        """
        for index, layer in enumerate(self.layers):
            if caches is not None:
                hidden_LBD = layer(hidden_LBD, sequence, caches[index])
            elif self.recompute_layers and self.training:
                # The sequence goes in by closure: checkpoint saves only tensors that carry gradients.
                hidden_LBD = tensor_parallel.checkpoint(lambda hidden, layer=layer: layer(hidden, sequence), False, hidden_LBD)
            else:
                hidden_LBD = layer(hidden_LBD, sequence)
            if after_layer is not None:
                after_layer(self.first_layer + index, hidden_LBD)
        return hidden_LBD if self.final_norm is None else self.final_norm(hidden_LBD)
