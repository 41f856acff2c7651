"""Streamed moments equal those of all rows at once, however the rows are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.vision_agglom.small import small_vision_run
from vision_agglom.targets.statistics import Moments


def rows(count: int = 500, channels: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return 1000 + torch.randn(count, channels, generator=generator) @ torch.randn(channels, channels, generator=generator)


@pytest.mark.parametrize("sizes", [[500], [1, 499], [100] * 5, [3, 7, 490]])
def test_any_cut_gives_the_same_moments(sizes: list[int]) -> None:
    streamed = Moments.empty(12)
    for part in rows().split(sizes):
        streamed.merge(Moments.of(part))
    exact = rows().double().numpy()
    np.testing.assert_allclose(streamed.mean_C, exact.mean(0), rtol=1e-14)
    # The mean is a thousand times the deviation: sums of squares would lose six digits here.
    np.testing.assert_allclose(streamed.covariance_CC, np.cov(exact.T, bias=True), rtol=0, atol=1e-11 * np.abs(np.cov(exact.T)).max())


def test_nothing_seen_changes_nothing() -> None:
    moments = Moments.of(rows())
    before = moments.scatter_CC.clone()
    moments.merge(Moments.empty(12))
    assert torch.equal(moments.scatter_CC, before)


def merge_over_ranks(run) -> list[np.ndarray]:
    from megatron_hybrid.substrate.groups import initialize, shutdown

    substrate = initialize(run)
    own = rows()[substrate.data_rank :: substrate.data_size]
    merged = Moments.of(own).merged_over(substrate.data_group)
    shutdown(substrate)
    return [merged.count.numpy(), merged.mean_C.numpy(), merged.scatter_CC.numpy()]


def test_all_ranks_get_the_same_bits(tmp_path, run_ranks) -> None:
    first, second = run_ranks(merge_over_ranks, 2, small_vision_run(tmp_path, parallel={"data": 2}))
    whole = Moments.of(rows())
    for here, there, exact in zip(first, second, (whole.count, whole.mean_C, whole.scatter_CC), strict=True):
        np.testing.assert_array_equal(here, there)
        np.testing.assert_allclose(here, exact, rtol=0, atol=1e-12 * np.abs(exact).max())
