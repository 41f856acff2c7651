"""Integer hashing and the permutations drawn from it.

The data order must be the same on every host and under every library version for as long as a run lives, so it hangs on these few lines
of 64-bit arithmetic and not on a library's random generator.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import numpy as np

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio, made odd: the increment of SplitMix64."""

_MASK_64 = (1 << 64) - 1
_MASK_63 = (1 << 63) - 1
_FEISTEL_ROUNDS = 6


def mix64(values: np.ndarray) -> np.ndarray:
    """Scramble ``values`` (uint64, any shape) with the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), a bijection on 64 bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key64(*parts: int | str) -> int:
    """Return 64 bits that depend on every one of ``parts`` and on their order."""
    text = "\x00".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def seeded_permutation(length: int, *key: int | str) -> np.ndarray:
    """Return the numbers 0 to ``length - 1`` (int64) in an order that depends on ``key`` alone."""
    counters = np.arange(length, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA) + np.uint64(key64(*key))
    return np.argsort(mix64(counters), kind="stable")


class SeededShuffle:
    """The numbers 0 to ``length - 1`` in an order that depends on ``key`` alone, one at a time and without a table.

    A Feistel network over pairs (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): a number is written as a pair of digits
    to a base of about the root of ``length``; each round shifts one digit by a hash of the other, which can be undone, so the whole is a
    permutation of the pairs. The few pairs beyond ``length`` are walked on until one lies inside.
    """

    def __init__(self, length: int, *key: int | str) -> None:
        self.length = length
        self._base = math.isqrt(max(length - 1, 0)) + 1
        self._round_keys = [key64(*key, round_number) for round_number in range(_FEISTEL_ROUNDS)]

    def __getitem__(self, position: int) -> int:
        """Return the number at ``position``."""
        while True:
            high, low = divmod(position, self._base)
            for key in self._round_keys:
                high, low = low, (high + _scrambled(low ^ key)) % self._base
            position = high * self._base + low
            if position < self.length:
                return position


def _scrambled(value: int) -> int:
    """SplitMix64's finaliser on one Python integer, as ``mix64`` on arrays."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def sample_hashes(indices: np.ndarray, tokens_BL: np.ndarray) -> np.ndarray:
    """Return a uint64 hash for each sample, of its global index and of its tokens in order.

    Args:
        indices: global sample indices, int64 [B].
        tokens_BL: token ids, int64.
    """
    positions_L = np.arange(1, tokens_BL.shape[1] + 1, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA)
    per_token_BL = mix64(tokens_BL.astype(np.uint64) + positions_L)
    return mix64(per_token_BL.sum(axis=1, dtype=np.uint64) ^ mix64(indices.astype(np.uint64)))


def combine_hashes(partials: Iterable[int]) -> int:
    """Return the batch hash of a step from the partial hashes of its parts: their sum modulo 2^63, whatever the order.

    An all-reduce of int64 partials by sum wraps modulo 2^64; ``combine_hashes([reduced])`` of its result gives the same number.
    """
    return sum(int(partial) & _MASK_64 for partial in partials) & _MASK_63
