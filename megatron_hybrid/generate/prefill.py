"""Prompts through the model in pieces, into caches: prompts of any lengths side by side, of any length in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hybrid.generate.stages import Stages
from megatron_hybrid.layers.sequence import Cache
from megatron_hybrid.model.hybrid import HybridModel

_LENGTH_UNIT = 64
"""Pieces are whole multiples of it, so that the scan's chunks come out even."""


@dataclass(frozen=True)
class Piece:
    """Tokens ``offset`` to ``offset + L`` of the first prompts, after the model."""

    offset: int
    num_valid: tuple[int, ...]
    """For each prompt the tokens that it has in this piece; the rest of the L is padding."""
    hidden_LBD: Tensor
    """The residual stream after this stage, final norm included on the last; the prompts behind the last that has tokens are left out."""


def run_prompts(
    model: HybridModel, prompts: Sequence[Sequence[int]], caches: Sequence[Cache], *, stages: Stages, max_tokens: int
) -> Iterator[Piece]:
    """Run prompts through this stage, piece by piece.

    Padding stands behind a prompt's last token, where causality hides it from attention, and its time steps are 0, which leaves the SSM and
    convolution states as they were. Prompts in descending order of length waste least.

    Args:
        model: this rank's stage.
        prompts: token ids, at least one each.
        caches: of as many sequences, one cache for each of the stage's layers; they start from nothing here.
        stages: the pipeline.
        max_tokens: of a piece, padding included, which bounds the memory that activations take.
    """
    device = next(model.parameters()).device
    for cache in caches:
        if cache is not None:
            cache.reset()
    offset = 0
    while any(len(prompt) > offset for prompt in prompts):
        remaining = [max(0, len(prompt) - offset) for prompt in prompts]
        count = max(row for row, tokens in enumerate(remaining, start=1) if tokens)
        most = max(_LENGTH_UNIT, max_tokens // count // _LENGTH_UNIT * _LENGTH_UNIT)
        length = min(max(remaining), most)
        num_valid = tuple(min(length, tokens) for tokens in remaining[:count])
        rows = [list(prompt[offset : offset + length]) for prompt in prompts[:count]]
        tokens_BL = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
        sequence = model.describe_sequence(length, offset=offset)
        if min(num_valid) < length:
            sequence.num_valid_B = torch.tensor(num_valid, device=device)
        if not stages.is_first:
            shape = (length, count, model.config.hidden_size)
            model.set_input_tensor([stages.receive(shape, model.config.params_dtype, device)])
        hidden_LBD = model.run_layers(tokens_BL, sequence, [cache and cache.rows(0, count) for cache in caches])
        stages.send(hidden_LBD)
        yield Piece(offset, num_valid, hidden_LBD)
        offset += length
