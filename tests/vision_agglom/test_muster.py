"""Which rank loads which teacher, and that no rank holds more of them than it has to."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.substrate.groups import initialize, shutdown
from tests.train.training import raised_by
from tests.vision_agglom.small import FACTS, RandomTeacher, small_vision_run
from vision_agglom.config.schema import VisionConfig
from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.muster import muster_teachers

COSTS = {"clip": 1.0, "dino": 2.0, "sam": 5.0}
NAMES = list(FACTS)


@dataclass
class Loads:
    """What one rank loaded."""

    names: list[str] = field(default_factory=list)
    alive_before: list[int] = field(default_factory=list)
    """How many teachers it held when each was loaded."""
    kept: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)


def muster(run: VisionConfig) -> Loads:
    """On every rank."""
    substrate = initialize(run)
    loads, alive = Loads(), weakref.WeakSet[Any]()

    def load(spec: TeacherConfig, device: torch.device, dtype: torch.dtype) -> RandomTeacher:
        loads.names.append(spec.name)
        loads.alive_before.append(len(alive))
        teacher: Any = RandomTeacher(spec, device, dtype)
        # As libraries' models may, so that counting references alone would not free it.
        teacher.itself = teacher
        alive.add(teacher)
        return teacher

    panel = muster_teachers(run, substrate, load)
    loads.kept, loads.facts = list(panel.teachers), list(panel.facts)
    shutdown(substrate)
    return loads


def partitioned(tmp_path: Path, **train: Any) -> VisionConfig:
    return small_vision_run(tmp_path, parallel={"data": 2}, train={"teacher_ranks": "partitioned", **train})


def test_with_given_costs_a_rank_loads_its_own_teachers_alone(tmp_path: Path, run_ranks) -> None:
    first, second = run_ranks(muster, 2, partitioned(tmp_path, teacher_costs=COSTS))
    assert (first.names, second.names) == (["sam"], ["clip", "dino"])
    for loads in (first, second):
        assert loads.kept == loads.names and loads.facts == NAMES


def test_teachers_are_measured_one_at_a_time(tmp_path: Path, run_ranks) -> None:
    ranks = run_ranks(muster, 2, partitioned(tmp_path))
    for loads in ranks:
        assert loads.names == [*NAMES, *loads.kept] and loads.facts == NAMES
        assert loads.alive_before == [0, 0, 0, *range(len(loads.kept))]
    assert sorted(name for loads in ranks for name in loads.kept) == NAMES


def test_without_division_every_rank_loads_all_once(tmp_path: Path, run_ranks) -> None:
    for loads in run_ranks(muster, 2, small_vision_run(tmp_path, parallel={"data": 2})):
        assert loads.names == loads.kept == loads.facts == NAMES


def test_ranks_that_compute_no_loss_load_none_and_know_all(tmp_path: Path, run_ranks) -> None:
    first, last = run_ranks(muster, 2, small_vision_run(tmp_path, parallel={"pipeline": 2}))
    assert (first.names, last.names) == ([], NAMES) and first.facts == last.facts == NAMES


def refusal(run: VisionConfig) -> str:
    return raised_by(muster, run)


@pytest.mark.parametrize("train", [{}, {"teacher_costs": COSTS}], ids=["measured", "given"])
def test_what_one_rank_cannot_use_all_refuse(train: dict[str, Any], tmp_path: Path, run_ranks) -> None:
    run = partitioned(tmp_path, **train)
    wrong = run.teachers[2].model_copy(update={"view": "match"})
    for message in run_ranks(refusal, 2, run.model_copy(update={"teachers": (*run.teachers[:2], wrong)})):
        assert "teacher 'sam' takes images of 64 pixels only" in message
