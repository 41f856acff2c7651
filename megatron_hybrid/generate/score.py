"""How probable a text is: log-probabilities of given tokens, from the pieces that the prefill makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_hybrid.generate.prefill import Piece
from megatron_hybrid.model.hybrid import HybridModel

_LOGITS_AT_ONCE = 1 << 27
"""Numbers of logits that are in memory at a time."""


class Score(NamedTuple):
    """Of the scored tokens of a sequence."""

    log_probability: float
    """Natural logarithm, summed over the tokens."""
    is_greedy: bool
    """Whether each is the most probable one."""


def score_piece(
    model: HybridModel, piece: Piece, sequences: Sequence[Sequence[int]], num_scored: Sequence[int], vocab_size: int, total_B2: Tensor
) -> None:
    """Add a piece's part to the totals.

    Args:
        model: the last stage.
        piece: of the sequences, their last tokens left out.
        sequences: token ids.
        num_scored: how many tokens of each are scored, the last ones.
        vocab_size: tokens that the probabilities are shared among.
        total_B2: fp64; the log-probability, and 1 while every token was the most probable one.
    """
    rows, places, targets = [], [], []
    for row, valid in enumerate(piece.num_valid):
        tokens = sequences[row]
        first = max(len(tokens) - num_scored[row] - 1 - piece.offset, 0)
        rows += [row] * max(0, valid - first)
        places += range(first, valid)
        targets += tokens[piece.offset + first + 1 : piece.offset + valid + 1]
    if not rows:
        return
    device = piece.hidden_LBD.device
    row_N, place_N, target_N = (torch.tensor(each, device=device) for each in (rows, places, targets))
    hidden_ND = piece.hidden_LBD[place_N, row_N]
    for part in torch.arange(len(rows), device=device).split(max(1, _LOGITS_AT_ONCE // vocab_size)):
        logits_NV = model.output_layer.logits(hidden_ND[part][None]).squeeze(1)[:, :vocab_size].float()
        target_N1 = target_N[part][:, None]
        log_probability_N = logits_NV.gather(1, target_N1).squeeze(1).double() - logits_NV.double().logsumexp(-1)
        is_greedy_N = (logits_NV.argmax(-1) == target_N[part]).double()
        total_B2[:, 0].index_add_(0, row_N[part], log_probability_N)
        total_B2[:, 1].scatter_reduce_(0, row_N[part], is_greedy_N, "prod")
