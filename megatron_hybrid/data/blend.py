"""Deterministic blending by random access: global sample index -> (source, sample of that source), in O(1) time and memory.

A phase shares its samples out in blocks of 1,024. How many of its first ``n`` samples each source gets is a pure function of ``n``
(``share_out``), so a block's contents are the difference of two such counts, and their order inside the block is a seeded permutation.
Weights are shares of samples; as all samples are equally long, they are shares of tokens.

A source goes on across phases where the phase before left it, so that its epochs are whole whatever the phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from megatron_hybrid.data.hashing import seeded_permutation

_BLOCK = 1024
_CACHED_BLOCKS = 64


@dataclass(frozen=True)
class BlendPhase:
    """A stretch of samples with its own weights."""

    start_sample: int
    """Global index of its first sample."""
    weights: tuple[float, ...]
    """Weight of each source, zero or more; normalised to their sum."""


def share_out(num_samples: int, weights: Sequence[Fraction]) -> list[int]:
    """Return how many of the first ``num_samples`` samples each source gets, in proportion to ``weights`` (which need not add up to 1).

    The counts add up to ``num_samples``, and none ever falls as ``num_samples`` grows. Rounding each cumulative share alone would lack the
    second property: with small weights a later count could be the smaller one. Instead the samples are halved down a binary tree of
    the sources: a node with ``n`` samples gives ``round(p n)`` to its left, which with ``p`` <= 1 rises by 0 or 1 per sample, and so does
        the rest. Each count is off its exact share by at most half a sample per level of the tree.
    """
    if len(weights) == 1:
        return [num_samples]
    middle = len(weights) // 2
    left, total = sum(weights[:middle], Fraction(0)), sum(weights, Fraction(0))
    share = left / total if total else Fraction(0)
    num_left = (2 * share.numerator * num_samples + share.denominator) // (2 * share.denominator)
    return share_out(num_left, weights[:middle]) + share_out(num_samples - num_left, weights[middle:])


class Blend:
    """The order in which sources take turns over a run.

    Args:
        phases: in order of their start; the first starts at sample 0. All have one weight per source.
        seed: of the order inside blocks.
    """

    def __init__(self, phases: Sequence[BlendPhase], seed: int) -> None:
        assert phases and phases[0].start_sample == 0, "the first phase starts at sample 0"
        self.phases = tuple(phases)
        self._seed = seed
        self._weights = [[Fraction(weight) for weight in phase.weights] for phase in self.phases]
        self._used_before = [np.zeros(len(self.phases[0].weights), dtype=np.int64)]
        self._block = lru_cache(maxsize=_CACHED_BLOCKS)(self._make_block)
        for number, following in enumerate(self.phases[1:]):
            self._used_before.append(self._used(number, following.start_sample))

    def phase_at(self, index: int) -> int:
        """Return the number of the phase that sample ``index`` belongs to."""
        return max(number for number, phase in enumerate(self.phases) if phase.start_sample <= index)

    def locate(self, index: int) -> tuple[int, int, int]:
        """Return (phase, source, index within the source) of a global sample index."""
        phase = self.phase_at(index)
        block, place = divmod(index - self.phases[phase].start_sample, _BLOCK)
        order, first, rank = self._block(phase, block)
        source = int(order[place])
        return phase, source, int(first[source] + rank[place])

    def used_before(self, index: int) -> np.ndarray:
        """Return how many samples of each source come before global sample ``index``, int64 [sources]."""
        return self._used(self.phase_at(index), index)

    def _used(self, phase: int, index: int) -> np.ndarray:
        block, place = divmod(index - self.phases[phase].start_sample, _BLOCK)
        order, first, _ = self._block(phase, block)
        return first + np.bincount(order[:place], minlength=len(first))

    def _make_block(self, phase: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (source of each place [block], samples each source used before the block [sources], rank of each place among its source's
        [block]).
        """
        before = np.array(share_out(block * _BLOCK, self._weights[phase]), dtype=np.int64)
        after = np.array(share_out((block + 1) * _BLOCK, self._weights[phase]), dtype=np.int64)
        counts = after - before
        order = np.repeat(np.arange(len(counts)), counts)[seeded_permutation(_BLOCK, "blend", self._seed, phase, block)]
        by_source = np.argsort(order, kind="stable")
        rank = np.empty(_BLOCK, dtype=np.int64)
        rank[by_source] = np.arange(_BLOCK) - np.repeat(np.cumsum(counts) - counts, counts)
        return order, self._used_before[phase] + before, rank
