"""Random numbers that belong to a sample: drawn by place from its index, never from a running generator."""

from __future__ import annotations

import numpy as np

from megatron_hybrid.data.hashing import GOLDEN_GAMMA, key64, mix64


def sample_uniforms(count: int, *key: int | str) -> list[float]:
    """Return ``count`` numbers, even over [0, 1), that depend on ``key`` alone (53 bits of SplitMix64 each)."""
    with np.errstate(over="ignore"):
        counters = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA) + np.uint64(key64(*key))
        return [float(bits) * 2.0**-53 for bits in mix64(counters) >> np.uint64(11)]
