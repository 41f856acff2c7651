"""Random numbers by address: what is drawn depends on the run's seed and on what it is drawn for, never on what was drawn before."""

from __future__ import annotations

import numpy as np

from megatron_hybrid.data.hashing import key64

_MASK_64 = (1 << 64) - 1


def generator_for(seed: int, purpose: str, *address: int) -> np.random.Generator:
    """A Philox generator (Salmon et al. 2011) of its own for (seed, purpose) and up to two numbers, such as step and sample.

    The numbers are words of the counter above those that drawing advances.
    """
    assert len(address) <= 2, address
    first, second = (*(number & _MASK_64 for number in address), 0, 0)[:2]
    key = np.array([key64(seed, purpose), 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, first, second], np.uint64)))


def choose(options: tuple[int, ...], seed: int, purpose: str, *address: int) -> int:
    """One of ``options``, drawn evenly for that address."""
    return options[int(generator_for(seed, purpose, *address).integers(len(options)))]
