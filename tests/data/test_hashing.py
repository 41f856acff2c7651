"""Permutations that need no table."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_hybrid.data.hashing import SeededShuffle, seeded_permutation


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 10, 97, 1000, 4099])
def test_shuffle_is_a_permutation(length: int) -> None:
    shuffle = SeededShuffle(length, "test", 0)
    assert sorted(shuffle[position] for position in range(length)) == list(range(length))


def test_shuffle_depends_on_its_key() -> None:
    orders = [[SeededShuffle(50, "test", seed)[position] for position in range(50)] for seed in range(5)]
    assert len(set(map(tuple, orders))) == 5


def test_shuffle_looks_random() -> None:
    """Neighbours land as far apart as in a random permutation, where the mean distance is a third of the length."""
    length = 10_000
    shuffle = SeededShuffle(length, "test", 1)
    order = np.array([shuffle[position] for position in range(length)])
    assert abs(np.abs(np.diff(order)).mean() / length - 1 / 3) < 0.02
    assert abs(np.corrcoef(order, np.arange(length))[0, 1]) < 0.05


def test_shuffle_reaches_far() -> None:
    length = 10**13
    shuffle = SeededShuffle(length, "test", 2)
    assert all(0 <= shuffle[position] < length for position in (0, 1, length - 1))


def test_table_is_a_permutation() -> None:
    assert sorted(seeded_permutation(100, "test")) == list(range(100))
