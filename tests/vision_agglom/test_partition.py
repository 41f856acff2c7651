"""A run's steps follow from its configuration and their number; ranks are divided so that the busiest has least to do."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from tests.vision_agglom.small import small_vision_run
from vision_agglom.partition import RunPlan, plan_teacher_ranks

STAGES = [
    {"steps": 6, "partitions": [{"resolutions": [32], "batch_size": 4}], "warmup_steps": 2},
    {
        "steps": 10,
        "lr": 2e-3,
        "partitions": [
            {"resolutions": [32, 40, 48], "batch_size": 4},
            {"resolutions": [64], "batch_size": 2, "rate": 0.25, "teachers": ["sam"]},
        ],
    },
]


def plan(tmp_path: Path) -> RunPlan:
    return RunPlan(small_vision_run(tmp_path, stages=STAGES))


def test_samples_and_steps_agree(tmp_path: Path) -> None:
    steps = plan(tmp_path)
    samples = 0
    for step in range(steps.run.total_steps):
        assert steps.run.samples_before(step) == samples
        assert steps.run.step_at(samples) == step
        samples += steps.plan(step).num_samples
    assert samples == steps.run.total_samples == 6 * 4 + 10 * 4 + 2 * 2


def test_rates_spread_evenly(tmp_path: Path) -> None:
    steps = plan(tmp_path)
    with_high = [step for step in range(6, 16) if len(steps.plan(step).parts) == 2]
    assert with_high == [9, 13]


def test_streams_go_on_without_gaps(tmp_path: Path) -> None:
    """Each partition's samples follow one another, whatever step one begins at."""
    steps = plan(tmp_path)
    for stream, stage_steps in ((0, range(6)), (1, range(6, 16)), (2, range(6, 16))):
        position = steps.first_sample(stream, stage_steps[0])
        for step in stage_steps:
            assert steps.first_sample(stream, step) == position
            for part in steps.plan(step).parts:
                if part.stream == stream:
                    assert steps.part_at(stream, position) == part
                    position += part.partition.batch_size


def test_resolutions_are_all_drawn_and_depend_on_the_seed(tmp_path: Path) -> None:
    drawn = [plan(tmp_path).plan(step).parts[0].resolution for step in range(6, 16)]
    assert set(drawn) == {32, 40, 48}
    other = RunPlan(small_vision_run(tmp_path, stages=STAGES, seed=5))
    assert drawn != [other.plan(step).parts[0].resolution for step in range(6, 16)]


def test_learning_rate_begins_anew_with_each_stage(tmp_path: Path) -> None:
    steps = plan(tmp_path)
    rates = [steps.learning_rate(steps.run.samples_before(step + 1)) for step in range(16)]
    assert rates[:2] == [0.5e-3, 1e-3]
    assert rates[5] < 1e-9 < 1.9e-3 < rates[6]
    assert rates[15] < 1e-9


def test_changed_stages_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no step begins after 27 images .*start a new run_dir"):
        plan(tmp_path).run.step_at(27)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7, 16])
def test_every_image_is_described_once_by_every_teacher(num_ranks: int) -> None:
    duties = plan_teacher_ranks({"sam": 8.0, "dino": 2.0, "clip": 1.0}, num_ranks)
    assert len(duties) == num_ranks
    for teacher in ("sam", "dino", "clip"):
        described = [image for of_rank in duties for duty in of_rank if duty.teacher == teacher for image in duty.images(24)]
        assert described == list(range(24))


@pytest.mark.parametrize("num_ranks", [3, 4, 6, 9])
def test_no_other_division_is_faster(num_ranks: int) -> None:
    costs = {"sam": 8.0, "dino": 3.0, "clip": 1.0}
    best = min(
        max(cost / size for cost, size in zip(costs.values(), sizes, strict=True))
        for sizes in product(range(1, num_ranks + 1), repeat=3)
        if sum(sizes) == num_ranks
    )
    busiest = max(sum(costs[duty.teacher] / duty.parts for duty in of_rank) for of_rank in plan_teacher_ranks(costs, num_ranks))
    assert busiest == best
