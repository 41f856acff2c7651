"""Moving the numbers of one correspondence between our arrangement and Hugging Face's: slices and copies, so that no bit changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.convert.correspondence import Correspondence


def to_hub(correspondence: Correspondence, native: Sequence[Tensor], model: ModelConfig) -> list[Tensor]:
    """Return Hugging Face's tensors, in the order of ``correspondence.hub``; views where that is enough.

    Args:
        correspondence: what the tensors are.
        native: ours, in the order of ``correspondence.native``.
        model: whose vocabulary and heads they have.
    """
    if correspondence.arrangement == "rows":
        return [torch.cat(list(native))]
    (tensor,) = native
    if correspondence.arrangement == "vocabulary":
        return [tensor[: model.vocab_size]]
    if correspondence.arrangement == "qkv":
        return [part.reshape(-1, tensor.shape[1]) for part in _by_group(tensor, model)]
    return [tensor]


def to_native(correspondence: Correspondence, hub: Sequence[Tensor], model: ModelConfig) -> list[Tensor]:
    """Return our tensors, in the order of ``correspondence.native``; views where that is enough. Padding rows of the vocabulary are zeros.

    Args:
        correspondence: what the tensors are.
        hub: Hugging Face's, in the order of ``correspondence.hub``.
        model: whose vocabulary and heads they have.
    """
    if correspondence.arrangement == "qkv":
        whole = hub[0].new_empty(correspondence.native[0].shape)
        for part, source in zip(_by_group(whole, model), hub, strict=True):
            part.copy_(source.view(part.shape))
        return [whole]
    (tensor,) = hub
    if correspondence.arrangement == "rows":
        return list(tensor.split([part.shape[0] for part in correspondence.native]))
    if correspondence.arrangement == "vocabulary" and model.padded_vocab_size > model.vocab_size:
        padded = tensor.new_zeros(correspondence.native[0].shape)
        padded[: model.vocab_size] = tensor
        return [padded]
    return [tensor]


def _by_group(qkv: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """Views of the queries, keys and values in linear_qkv, each [KV groups, rows of a group, hidden]."""
    queries = model.num_attention_heads // model.num_kv_heads * model.head_dim
    return qkv.view(model.num_kv_heads, -1, qkv.shape[1]).split([queries, model.head_dim, model.head_dim], dim=1)
