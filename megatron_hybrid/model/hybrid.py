"""The hybrid language model: embedding, stack, output layer; each pipeline stage builds the part it holds.

Parameter names are those of Megatron-LM's MambaModel: ``embedding.word_embeddings.weight``, ``decoder.layers.N...``,
``decoder.final_norm.weight``, ``output_layer.weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence as Items
from typing import Literal

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.layers.sequence import Sequence
from megatron_hybrid.layers.specs import Ops
from megatron_hybrid.model.stack import HybridStack
from megatron_hybrid.model.vocabulary import Embedding, OutputLayer
from megatron_hybrid.ops.attention import document_mask
from megatron_hybrid.ops.rope import rope_tables


class HybridModel(MegatronModule):
    """One stage's part of a hybrid language model."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        ops: Ops,
        *,
        layer_range: tuple[int, int],
        is_first_stage: bool,
        is_last_stage: bool,
        recompute: Literal["none", "selective", "full"] = "none",
    ) -> None:
        super().__init__(config)
        # megatron-core's schedules and gradient finalisation read these two.
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.rope = (model.head_dim, model.rope_theta) if model.position_embedding == "rope" else None
        self.input_tensor: Tensor | None = None
        self.pre_process, self.post_process = is_first_stage, is_last_stage
        if is_first_stage:
            self.embedding = Embedding(model, config, ops)
        self.decoder = HybridStack(model, config, ops, layer_range=layer_range, recompute=recompute, has_final_norm=is_last_stage)
        if is_last_stage:
            self.output_layer = OutputLayer(model, config, ops)

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Take the previous stage's output [L or L/tp, B, D]; called by megatron-core's pipeline schedules."""
        (self.input_tensor,) = input_tensor

    def named_global_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters by their name in the whole model: the stage's layer 0 may be the model's layer 26."""
        for name, parameter in self.named_parameters():
            yield global_name(name, self.decoder.first_layer), parameter

    def forward(
        self,
        tokens_BL: Tensor,
        *,
        labels_BL: Tensor | None = None,
        loss_mask_BL: Tensor | None = None,
        segment_ids_BL: Tensor | None = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            tokens_BL: int64 token ids, on every stage.
            labels_BL: int64 ids to predict; only the last stage reads them.
            loss_mask_BL: fp32 weight of each token's loss, given together with the labels.
            segment_ids_BL: int32 document numbers, when documents are kept apart.

        Returns:
            Before the last stage the residual stream [L or L/tp, B, D]. On the last, the weighted sum of token losses (fp32 scalar), or
            without labels the logits [B, L, V] in the working precision, gathered over the tensor ranks and cut to the true vocabulary.
        """
        hidden_LBD = self.run_layers(tokens_BL, self.describe_sequence(tokens_BL.shape[1], segment_ids_BL))
        if not self.post_process:
            return hidden_LBD
        return (
            self.output_layer.logits(hidden_LBD) if labels_BL is None else self.output_layer.loss_sum(hidden_LBD, labels_BL, loss_mask_BL)
        )

    def describe_sequence(self, length: int, segment_ids_BL: Tensor | None = None, offset: int = 0) -> Sequence:
        """Prepare once what every layer needs to know of the sequence."""
        device = next(self.parameters()).device
        positions_L = torch.arange(offset, offset + length, device=device)
        return Sequence(
            offset=offset,
            segment_ids_BL=segment_ids_BL,
            attention_mask_B1LS=None if segment_ids_BL is None else document_mask(segment_ids_BL),
            rope_cos_sin=None if self.rope is None else rope_tables(positions_L, *self.rope),
        )

    def run_layers(
        self,
        tokens_BL: Tensor,
        sequence: Sequence,
        caches: Items[object] | None = None,
        after_layer: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Embedding (on the first stage) and this stage's layers, final norm included on the last; see ``HybridStack``."""
        hidden_LBD = self.embedding(tokens_BL) if self.pre_process else self.input_tensor
        return self.decoder(hidden_LBD, sequence, caches, after_layer)


def global_name(local_name: str, first_layer: int) -> str:
    """Renumber a stage's ``decoder.layers.I`` to its place in the whole model.

    >>> global_name("decoder.layers.0.mixer.D", 26)
    'decoder.layers.26.mixer.D'
    """
    prefix = "decoder.layers."
    if not local_name.startswith(prefix):
        return local_name
    index, rest = local_name[len(prefix) :].split(".", 1)
    return f"{prefix}{int(index) + first_layer}.{rest}"
