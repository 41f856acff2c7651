"""Choosing the next token from logits: greedy, temperature, top-k and top-p (nucleus) sampling (Holtzman et al. 2020, arXiv 1904.09751)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. top_k is applied first, then top_p to what it left.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable token."""
    top_k: int | None = None
    """Choose among this many most probable tokens; None for all."""
    top_p: float = 1.0
    """Choose among the fewest most probable tokens whose probabilities add up to at least this."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or a finite number above it, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; leave it out to choose among all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}; 1 chooses among all tokens")


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw the next token of each sequence, int64 [B]; the generator is on the device of the logits, and is not used for greedy choice."""
    if sampling.temperature == 0.0:
        return logits_BV.argmax(-1)
    return torch.multinomial(probabilities(logits_BV, sampling), 1, generator=generator).squeeze(1)


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that ``sample`` draws from at a temperature above 0, fp64 [B, V]."""
    # The largest logit becomes 0, so that no temperature, however low, gives infinity / infinity.
    logits_BV = logits_BV.double()
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1.0:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    return logits_BV.softmax(-1)


def keep_top_k(logits_BV: Tensor, top_k: int) -> Tensor:
    """Set all but the ``top_k`` largest logits of each row to -inf; among equal ones exactly as many stay as there is room for."""
    kept = logits_BV.topk(min(top_k, logits_BV.shape[-1]), dim=-1)
    return torch.full_like(logits_BV, float("-inf")).scatter(-1, kept.indices, kept.values)


def keep_top_p(logits_BV: Tensor, top_p: float) -> Tensor:
    """Set to -inf what comes, by probability, after the first tokens that together have at least ``top_p``; the first always stays."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    share_BV = sorted_BV.softmax(-1)
    share_before_BV = share_BV.cumsum(-1) - share_BV
    dropped_BV = torch.zeros_like(share_BV, dtype=torch.bool).scatter(-1, order_BV, share_before_BV >= top_p)
    return logits_BV.masked_fill(dropped_BV, float("-inf"))
