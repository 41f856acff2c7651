"""Choosing the next token from logits: greedy, or drawn after temperature, top-k, top-p (nucleus sampling, Holtzman et al. 2020, arXiv
1904.09751), min-p (Nguyen et al. 2024, arXiv 2407.01082) and a repetition penalty (Keskar et al. 2019, arXiv 1909.05858).

Every sequence of a batch has settings and draws of its own. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hybrid.generate.draws import uniforms

NOT_FINITE = -1
"""In place of a token whose logits are not finite."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the penalty first, then temperature, top_k, top_p of what that left, min_p.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable token."""
    top_k: int | None = None
    """Choose among this many most probable tokens; None for all."""
    top_p: float = 1.0
    """Choose among the fewest most probable tokens whose probabilities add up to at least this."""
    min_p: float = 0.0
    """Choose among tokens at least this many times as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Logits of tokens that the prompt or the text so far has are divided by it where positive, and multiplied where negative."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or a finite number above it, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; leave it out to choose among all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}; 1 chooses among all tokens")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be from 0 to 1, got {self.min_p}; 0 chooses among all tokens")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be a finite number above 0, got {self.repetition_penalty}; 1 penalises nothing")


@dataclass(frozen=True)
class Needs:
    """Which steps of the choice some sequence of a batch needs; the others change nothing and are left out."""

    draws: bool
    sorts: bool
    penalises: bool

    @classmethod
    def of(cls, settings: Iterable[Sampling]) -> Needs:
        """What these need together."""
        settings = list(settings)
        drawn = [each for each in settings if each.temperature > 0]
        return cls(
            draws=bool(drawn),
            sorts=any(each.top_k is not None or each.top_p < 1 for each in drawn),
            penalises=any(each.repetition_penalty != 1 for each in settings),
        )


@dataclass(frozen=True)
class SamplingRows:
    """The settings of B sequences on the device, each row set when a sequence comes and read at every step."""

    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    repetition_penalty_B: Tensor
    seed_B: Tensor
    has_seen_BV: Tensor
    """Tokens that a row's prompt or text has; kept up only for rows with a penalty."""

    @classmethod
    def greedy(cls, batch_size: int, vocab_size: int, device: torch.device) -> SamplingRows:
        """All rows take the most probable token."""

        def column(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((batch_size,), value, dtype=dtype, device=device)

        return cls(
            temperature_B=column(0.0, torch.float64),
            top_k_B=column(vocab_size, torch.int64),
            top_p_B=column(1.0, torch.float64),
            min_p_B=column(0.0, torch.float64),
            repetition_penalty_B=column(1.0, torch.float64),
            seed_B=column(0, torch.int64),
            has_seen_BV=torch.zeros(batch_size, vocab_size, dtype=torch.bool, device=device),
        )

    def set(self, row: int, sampling: Sampling, seed: int, prompt: Sequence[int]) -> None:
        """Give a row to a new sequence."""
        vocab_size = self.has_seen_BV.shape[1]
        self.temperature_B[row] = sampling.temperature
        self.top_k_B[row] = min(sampling.top_k or vocab_size, vocab_size)
        self.top_p_B[row] = sampling.top_p
        self.min_p_B[row] = sampling.min_p
        self.repetition_penalty_B[row] = sampling.repetition_penalty
        self.seed_B[row] = seed
        if sampling.repetition_penalty != 1:
            self.has_seen_BV[row] = False
            known = [token for token in set(prompt) if token < vocab_size]
            self.has_seen_BV[row, torch.tensor(known, dtype=torch.int64, device=self.seed_B.device)] = True

    def rows(self, first: int, end: int) -> SamplingRows:
        """The same memory, of rows ``first`` to ``end`` (exclusive)."""
        return SamplingRows(**{name: getattr(self, name)[first:end] for name in self.__dataclass_fields__})


def choose(logits_BV: Tensor, rows: SamplingRows, position_B: Tensor, needs: Needs) -> Tensor:
    """Choose the next token of each sequence, int64 [B]; ``NOT_FINITE`` where logits are NaN or infinite.

    Args:
        logits_BV: any floating dtype.
        rows: the sequences' settings.
        position_B: int64, tokens before the one that is chosen: with the seed, what a draw depends on.
        needs: at least what the rows need.
    """
    if needs.penalises:
        logits_BV = penalise(logits_BV, rows)
    best_B = logits_BV.max(-1)
    tokens_B = best_B.indices
    if needs.draws:
        drawn_B = _draw(probabilities(logits_BV, rows, needs), uniforms(rows.seed_B, position_B))
        tokens_B = torch.where(rows.temperature_B > 0, drawn_B, tokens_B)
    # A NaN or +infinity anywhere is the maximum.
    tokens_B = torch.where(best_B.values.isfinite(), tokens_B, NOT_FINITE)
    if needs.penalises:
        rows.has_seen_BV.scatter_(1, tokens_B.clamp_min(0)[:, None], True)
    return tokens_B


def penalise(logits_BV: Tensor, rows: SamplingRows) -> Tensor:
    """The repetition penalty, fp64 [B, V]."""
    logits_BV, penalty_B1 = logits_BV.double(), rows.repetition_penalty_B[:, None]
    penalised_BV = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return torch.where(rows.has_seen_BV, penalised_BV, logits_BV)


def probabilities(logits_BV: Tensor, rows: SamplingRows, needs: Needs) -> Tensor:
    """The distribution that a token is drawn from at a temperature above 0, fp64 [B, V], in the order of the vocabulary."""
    # The largest logit becomes 0, so that no temperature, however low, gives infinity / infinity.
    scaled_BV = logits_BV.double()
    scaled_BV = (scaled_BV - scaled_BV.amax(-1, keepdim=True)) / rows.temperature_B[:, None]
    # The largest is 0 at temperature 0 too; its row is not looked at.
    scaled_BV = scaled_BV.nan_to_num(nan=0.0, neginf=float("-inf"))
    if needs.sorts:
        scaled_BV = _keep_most_probable(scaled_BV, logits_BV, rows)
    return scaled_BV.masked_fill(scaled_BV < rows.min_p_B[:, None].log(), float("-inf")).softmax(-1)


def _keep_most_probable(scaled_BV: Tensor, logits_BV: Tensor, rows: SamplingRows) -> Tensor:
    """top_k, then top_p of what that left: the others become -inf. Among equal logits the earlier token is the more probable one; the most
    probable one always stays."""
    order_BV = logits_BV.float().sort(dim=-1, descending=True, stable=True).indices
    rank_V = torch.arange(scaled_BV.shape[1], device=scaled_BV.device)
    sorted_BV = scaled_BV.gather(-1, order_BV).masked_fill(rank_V >= rows.top_k_B[:, None], float("-inf"))
    share_BV = sorted_BV.softmax(-1)
    is_beyond_BV = share_BV.cumsum(-1) - share_BV >= rows.top_p_B[:, None]
    is_beyond_BV &= rank_V > 0
    return torch.empty_like(scaled_BV).scatter_(-1, order_BV, sorted_BV.masked_fill(is_beyond_BV, float("-inf")))


def _draw(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token in whose share of the cumulated probabilities the uniform number falls, int64 [B]."""
    cumulated_BV = probability_BV.cumsum(-1)
    total_B1 = cumulated_BV[:, -1:].contiguous()
    target_B1 = torch.minimum(uniform_B[:, None] * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulated_BV, target_B1, right=True).squeeze(1)
