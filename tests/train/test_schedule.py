"""Learning rate over tokens."""

from __future__ import annotations

import pytest

from megatron_hybrid.config import OptimizerConfig, ScheduleConfig
from megatron_hybrid.config.schema import check_schedule
from megatron_hybrid.train.schedule import learning_rate

OPTIMIZER = OptimizerConfig(lr=1.0, min_lr=0.1)
TOTAL = 1000


def rates(schedule: ScheduleConfig, positions: list[int]) -> list[float]:
    return [learning_rate(schedule, OPTIMIZER, tokens, TOTAL) for tokens in positions]


def test_warm_up_is_linear() -> None:
    assert rates(ScheduleConfig(kind="constant", warmup_tokens=100), [10, 50, 100, 900]) == pytest.approx([0.1, 0.5, 1.0, 1.0])


def test_cosine_runs_from_peak_to_minimum() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_tokens=200)
    assert rates(schedule, [200, 600, 1000]) == pytest.approx([1.0, 0.55, 0.1])


def test_cosine_stays_at_the_minimum_after_its_decay() -> None:
    assert rates(ScheduleConfig(kind="cosine", decay_tokens=500), [500, 700, 1000]) == pytest.approx([0.1, 0.1, 0.1])


@pytest.mark.parametrize(("shape", "half_way"), [("linear", 0.55), ("cosine", 0.55), ("minus_sqrt", 0.1 + 0.9 * (1 - 0.5**0.5))])
def test_wsd_decays_at_the_end(shape: str, half_way: float) -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_tokens=100, decay_tokens=200, wsd_decay=shape)
    assert rates(schedule, [100, 500, 800, 900, 1000]) == pytest.approx([1.0, 1.0, 1.0, half_way, 0.1])


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_rate_never_rises_after_warm_up(kind: str) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_tokens=100, decay_tokens=300)
    values = rates(schedule, list(range(100, 1001)))
    assert all(later <= earlier for earlier, later in zip(values, values[1:]))
    assert min(values) >= OPTIMIZER.min_lr


@pytest.mark.parametrize(
    "schedule",
    [
        ScheduleConfig(kind="cosine", warmup_tokens=1001),
        ScheduleConfig(kind="wsd", warmup_tokens=600, decay_tokens=600),
        ScheduleConfig(kind="cosine", warmup_tokens=500, decay_tokens=400),
        ScheduleConfig(kind="constant", warmup_tokens=0),
    ],
)
def test_schedule_that_does_not_fit_is_refused(schedule: ScheduleConfig) -> None:
    with pytest.raises(ValueError, match="tokens|min_lr"):
        check_schedule(schedule, OPTIMIZER, TOTAL)
