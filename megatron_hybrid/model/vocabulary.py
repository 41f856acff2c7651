"""Into the model and out of it: token embedding, output projection and loss, cut over the vocabulary."""

from __future__ import annotations

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.layers.linear import whole_sequence
from megatron_hybrid.layers.parameters import declare, normal
from megatron_hybrid.layers.specs import Ops


class Embedding(torch.nn.Module):
    """Vocabulary-parallel token embedding; scatters its output along the sequence under sequence parallelism."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        self.word_embeddings = EmbeddingTable(model, config, ops)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Map [B, L] token ids to [L or L/tp, B, D]."""
        partial_LBD = self.word_embeddings(tokens_BL).transpose(0, 1).contiguous()
        group = get_tensor_model_parallel_group()
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(partial_LBD, group=group)
        return reduce_from_tensor_model_parallel_region(partial_LBD, group=group)


class EmbeddingTable(torch.nn.Module):
    """This rank's rows of the table."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.embedding = ops.embedding
        tensor_ranks = config.tensor_model_parallel_size
        num_rows = model.padded_vocab_size // tensor_ranks
        self.first_row = get_tensor_model_parallel_group().rank() * num_rows
        self.weight = torch.nn.Parameter(torch.empty(num_rows, model.hidden_size, dtype=config.params_dtype))
        declare(self.weight, initializer=normal(model.init_std), tensor_ranks=tensor_ranks, axis=0)
        self.weight.is_embedding_or_output_parameter = True

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Map [B, L] token ids to [B, L, D], zero where the token is another rank's."""
        return self.embedding(self.weight, tokens_BL, self.first_row)


class OutputLayer(torch.nn.Module):
    """Vocabulary-parallel projection onto the vocabulary, and the loss taken from it without ever holding all logits."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.ops, self.vocab_size, self.sequence_parallel = ops, model.vocab_size, config.sequence_parallel
        tensor_ranks = config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.empty(model.padded_vocab_size // tensor_ranks, model.hidden_size, dtype=config.params_dtype))
        declare(self.weight, initializer=normal(model.init_std), tensor_ranks=tensor_ranks, axis=0)
        self.weight.is_embedding_or_output_parameter = True

    def loss_sum(self, hidden_LBD: Tensor, labels_BL: Tensor, loss_mask_BL: Tensor) -> Tensor:
        """Cross entropy summed with the given weights, fp32 scalar; padded vocabulary rows take no part."""
        total, _ = self.ops.linear_cross_entropy(
            whole_sequence(hidden_LBD, self.sequence_parallel),
            self.weight,
            labels_BL.t(),
            loss_mask_BL.t(),
            vocab_size=self.vocab_size,
            group=get_tensor_model_parallel_group(),
        )
        return total

    def logits(self, hidden_LBD: Tensor) -> Tensor:
        """Logits [B, L, V] of the true vocabulary, gathered over the tensor ranks, in the working precision."""
        local_LBV = self.ops.linear(whole_sequence(hidden_LBD, self.sequence_parallel), self.weight)
        logits_LBV = gather_from_tensor_model_parallel_region(local_LBV, group=get_tensor_model_parallel_group())
        return logits_LBV[..., : self.vocab_size].transpose(0, 1)
