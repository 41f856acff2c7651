"""Exact parameter counts, of a whole model or of one rank.

Linear layers have no bias, the convolution has one, and the output layer is separate from the embedding (Nemotron-H, arXiv 2504.03624,
section 2.1). Tensor parallelism splits every weight but the RMSNorms of the residual stream, which each tensor rank holds in full.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hybrid.layout.pattern import ATTENTION, MAMBA, MLP, count_kinds
from megatron_hybrid.layout.shape import (
    HybridShape,
    attention_inner_size,
    attention_projection_size,
    mamba_conv_channels,
    mamba_projection_size,
)


def num_layer_parameters(shape: HybridShape, kind: str, tensor: int = 1) -> int:
    """Return the parameters of one layer of ``kind``, its pre-norm included, on one of ``tensor`` tensor ranks.

    Where MLP layers differ in width, ``shape`` is ``of_layer``.
    """
    split = {MAMBA: _num_mamba_weights, ATTENTION: _num_attention_weights, MLP: _num_mlp_weights}[kind](shape)
    assert split % tensor == 0, f"{split} weights of a {kind!r} layer over {tensor} tensor ranks"
    return shape.hidden_size + split // tensor


def num_embedding_parameters(shape: HybridShape, tensor: int = 1) -> int:
    """Return the parameters of the embedding, padded rows included, on one tensor rank."""
    return shape.padded_vocab_size // tensor * shape.hidden_size


def num_head_parameters(shape: HybridShape, tensor: int = 1) -> int:
    """Return the parameters of the final norm and the output layer on one tensor rank."""
    return shape.hidden_size + num_embedding_parameters(shape, tensor)


def num_parameters(shape: HybridShape) -> int:
    """Return the parameters of the whole model."""
    return sum(num_stage_parameters(shape, [(0, len(shape.layer_kinds))]))


def num_stage_parameters(shape: HybridShape, stages: Sequence[tuple[int, int]], tensor: int = 1) -> tuple[int, ...]:
    """Return the parameters of each (virtual) stage on one tensor rank; the first holds the embedding, the last the head.

    Args:
        shape: the model.
        stages: (first, end) layer range per stage, as ``plan_stages`` gives them.
        tensor: tensor-parallel ranks.
    """
    of_layers = [num_layer_parameters(shape.of_layer(layer), kind, tensor) for layer, kind in enumerate(shape.layer_kinds)]
    counts = [sum(of_layers[first:end]) for first, end in stages]
    counts[0] += num_embedding_parameters(shape, tensor)
    counts[-1] += num_head_parameters(shape, tensor)
    return tuple(counts)


def num_parameters_by_kind(shape: HybridShape) -> dict[str, int]:
    """Return the parameters of all layers of each kind together, embedding and head left out."""
    totals = dict.fromkeys(count_kinds(shape.layer_kinds), 0)
    for layer, kind in enumerate(shape.layer_kinds):
        totals[kind] += num_layer_parameters(shape.of_layer(layer), kind)
    return totals


def _num_mamba_weights(shape: HybridShape) -> int:
    """in_proj; convolution and its bias; A_log, D and dt_bias per head; gated norm; out_proj."""
    projections = shape.hidden_size * (mamba_projection_size(shape) + shape.mamba_inner_size)
    convolution = mamba_conv_channels(shape) * (shape.mamba_conv_width + 1)
    return projections + convolution + 3 * shape.mamba_num_heads + shape.mamba_inner_size


def _num_attention_weights(shape: HybridShape) -> int:
    return shape.hidden_size * (attention_projection_size(shape) + attention_inner_size(shape))


def _num_mlp_weights(shape: HybridShape) -> int:
    return 2 * shape.hidden_size * shape.ffn_hidden_size
