"""Blending: exact shares, random access that equals going in order, counters that never skip or repeat."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from megatron_hybrid.data.blend import Blend, BlendPhase, share_out
from megatron_hybrid.data.hashing import combine_hashes, key64, mix64, sample_hashes, seeded_permutation

WEIGHTS = [(1.0,), (0.59, 0.2, 0.088, 0.05, 0.04, 0.029, 0.003), (1.0, 0.0, 1e-4), (0.0, 5.0), (1.0,) * 9]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_add_up_never_fall_and_stay_close(weights: tuple[float, ...]) -> None:
    exact = [Fraction(weight) for weight in weights]
    levels = int(np.ceil(np.log2(len(weights))))
    before = [0] * len(weights)
    for num_samples in range(3000):
        counts = share_out(num_samples, exact)
        assert sum(counts) == num_samples
        assert all(0 <= now - then <= 1 for now, then in zip(counts, before, strict=True))
        for count, weight in zip(counts, exact, strict=True):
            assert abs(count - num_samples * weight / sum(exact)) <= Fraction(levels, 2)
        before = counts


def test_shares_are_exact_far_out() -> None:
    weights = [Fraction(weight) for weight in (0.3, 0.3, 0.4)]
    counts = share_out(10**18, weights)
    assert sum(counts) == 10**18
    assert all(abs(count - 10**18 * weight / sum(weights)) <= 1 for count, weight in zip(counts, weights, strict=True))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_source_is_counted_through(weights: tuple[float, ...]) -> None:
    other = tuple(reversed(weights))
    blend = Blend([BlendPhase(0, weights), BlendPhase(1500, other), BlendPhase(4000, weights)], seed=3)
    counters = [0] * len(weights)
    for index in range(6000):
        assert blend.used_before(index).tolist() == counters
        phase, source, sample = blend.locate(index)
        assert phase == (index >= 1500) + (index >= 4000)
        assert blend.phases[phase].weights[source] > 0
        assert sample == counters[source], "no sample of a source is left out or repeated, across phases either"
        counters[source] += 1


def test_random_access_equals_going_in_order() -> None:
    phases = [BlendPhase(0, (0.7, 0.3)), BlendPhase(2500, (0.1, 0.9))]
    in_order = Blend(phases, seed=1)
    wanted = [in_order.locate(index) for index in range(5000)]
    for index in np.random.default_rng(0).permutation(5000)[:500]:
        assert Blend(phases, seed=1).locate(int(index)) == wanted[index]


def test_phases_have_their_shares() -> None:
    blend = Blend([BlendPhase(0, (59.0, 20.0, 21.0)), BlendPhase(60_000, (1.0, 2.0, 1.0))], seed=0)
    first, both = blend.used_before(60_000), blend.used_before(100_000)
    assert np.abs(first / 60_000 - [0.59, 0.20, 0.21]).max() < 1e-3
    assert np.abs((both - first) / 40_000 - [0.25, 0.5, 0.25]).max() < 1e-3


def test_order_is_mixed_and_depends_on_the_seed() -> None:
    sources = [[Blend([BlendPhase(0, (0.5, 0.5))], seed).locate(index)[1] for index in range(1024)] for seed in (0, 1)]
    assert sources[0] != sources[1]
    assert max(len(run) for run in "".join(map(str, sources[0])).split("1")) < 30


def test_permutation_is_fixed_for_all_time() -> None:
    # Written down: a change would give every run in the world another data order on resume.
    assert seeded_permutation(8, "documents", 1234, "web", 0).tolist() == [6, 0, 3, 1, 7, 2, 4, 5]
    assert int(mix64(np.array([1], dtype=np.uint64))[0]) == 0x5692161D100B05E5
    assert key64("a", 1) != key64("a1") and key64("1") != key64(1)
    assert sorted(seeded_permutation(1000, 5).tolist()) == list(range(1000))


def test_batch_hash_ignores_order_and_sees_everything_else() -> None:
    tokens = np.random.default_rng(0).integers(0, 1000, (6, 32))
    indices = np.arange(100, 106)
    hashes = sample_hashes(indices, tokens)
    whole = combine_hashes(hashes.tolist())
    assert 0 <= whole < 2**63
    parts = [int(part.sum(dtype=np.uint64)) for part in (hashes[[5, 0]], hashes[[3]], hashes[[1, 4, 2]])]
    assert combine_hashes(parts) == whole
    for changed_indices, changed in [
        (indices + 1, tokens),
        (indices, tokens[:, ::-1]),
        (indices, tokens[::-1]),
        (indices, tokens + np.eye(6, 32, dtype=int)),
    ]:
        assert combine_hashes(sample_hashes(changed_indices, changed).tolist()) != whole
