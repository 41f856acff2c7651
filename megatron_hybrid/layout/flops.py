"""Exact model FLOPs per trained token, by layer kind. A multiply-add counts 2.

What counts is what the model's definition asks for, not what an implementation happens to do, so that MFU cannot be raised by wasted work:

- Contractions only: projections, convolution, SSM, attention scores and values, output layer. Norms, activations, gates, softmax, rotary
  embedding and the embedding lookup (a gather, no arithmetic) are left out.
- Training is three times the forward pass: backward takes one such contraction for the input and one for the weight (or for the other
  operand). Recomputed activations do not count.
- Attention is causal: position t of L (from 1) reads t positions, so a token reads (L + 1) / 2 on average. Where documents are reset inside
  a sample attention needs less; the figure stays that of a sample of one document.
- The output layer counts the vocabulary, without the rows that pad it.
- The SSM counts as its recurrence, per head channel and state element: decay the state (1), form the outer product (1), add it (1) and
  contract with C (2), which makes 5 x inner x state per token. Mamba-2's chunked algorithm (SSD, arXiv 2405.21060, section 6) computes the
  same function. With chunks of Q tokens, and counting the causal half of its score matrix, it takes per token

      (Q + 1) x groups x state    scores C B^T
    + (Q + 1) x inner             scores times x
    +       2 x inner x state     states of the chunks, B^T x
    +       2 x inner x state     outputs from the carried state, C h
    + (2 / Q) x inner x state     carrying the state over chunks

  which is about (4 + Q / state) x inner x state: near 5 as well where Q = state. The recurrence is the one that does not move with Q, which
  is a matter of speed alone. The formula in general use counts 7 x inner x state. That is Mamba-1's scan, where every state element also
  multiplies dt by A and takes its exponential; in Mamba-2, A is one number per head, so neither is done per state element. Ours is hence
  lower than the general formula by 2 x inner x state per Mamba layer: 0.3 % of Nemotron-H 8B.
"""

from __future__ import annotations

from megatron_hybrid.layout.pattern import ATTENTION, MAMBA, MLP, count_kinds
from megatron_hybrid.layout.shape import (
    HybridShape,
    attention_inner_size,
    attention_projection_size,
    mamba_conv_channels,
    mamba_projection_size,
)

_TRAINING_PASSES = 3


def layer_training_flops(shape: HybridShape, kind: str, sequence_length: int) -> int:
    """Return the training FLOPs per token of one layer of ``kind``, at samples of ``sequence_length`` tokens.

    Where MLP layers differ in width, ``shape`` is ``of_layer``.
    """
    if kind == ATTENTION:
        forward = _attention_forward_flops(shape, sequence_length)
    else:
        forward = {MAMBA: _mamba_forward_flops, MLP: _mlp_forward_flops}[kind](shape)
    return _TRAINING_PASSES * forward


def head_training_flops(shape: HybridShape) -> int:
    """Return the training FLOPs per token of the output layer."""
    return _TRAINING_PASSES * 2 * shape.hidden_size * shape.vocab_size


def training_flops_by_kind(shape: HybridShape, sequence_length: int) -> dict[str, int]:
    """Return the training FLOPs per token of all layers of each kind together, the head left out."""
    totals = dict.fromkeys(count_kinds(shape.layer_kinds), 0)
    for layer, kind in enumerate(shape.layer_kinds):
        totals[kind] += layer_training_flops(shape.of_layer(layer), kind, sequence_length)
    return totals


def training_flops_per_token(shape: HybridShape, sequence_length: int) -> int:
    """Return the training FLOPs per token of the whole model: the figure behind TFLOP/s and MFU.

    Args:
        shape: the model.
        sequence_length: tokens per sample; attention alone depends on it.
    """
    return sum(training_flops_by_kind(shape, sequence_length).values()) + head_training_flops(shape)


def _mamba_forward_flops(shape: HybridShape) -> int:
    projections = 2 * shape.hidden_size * (mamba_projection_size(shape) + shape.mamba_inner_size)
    convolution = 2 * shape.mamba_conv_width * mamba_conv_channels(shape)
    recurrence = 5 * shape.mamba_inner_size * shape.mamba_state_dim
    return projections + convolution + recurrence


def _attention_forward_flops(shape: HybridShape, sequence_length: int) -> int:
    inner = attention_inner_size(shape)
    projections = 2 * shape.hidden_size * (attention_projection_size(shape) + inner)
    # Scores and values are 2 x inner each per position read, and (sequence_length + 1) / 2 positions are read.
    return projections + 2 * inner * (sequence_length + 1)


def _mlp_forward_flops(shape: HybridShape) -> int:
    return 4 * shape.hidden_size * shape.ffn_hidden_size
