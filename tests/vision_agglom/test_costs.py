"""A teacher costs what its passes over the run's own micro-batches cost, mosaics included, in the shares in which they come."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vision_agglom.small import FACTS, small_vision_run
from vision_agglom.config.schema import VisionConfig
from vision_agglom.contract import TeacherFeatures
from vision_agglom.costs import Workload, count_workloads, time_teacher
from vision_agglom.panel import TeacherPanel
from vision_agglom.partition import plan_teacher_ranks

STAGES = [
    {"steps": 4, "partitions": [{"resolutions": [32], "batch_size": 8, "micro_batch_size": 8}]},
    {
        "steps": 8,
        "partitions": [
            {"resolutions": [32], "batch_size": 8, "micro_batch_size": 2},
            {"resolutions": [40, 48], "batch_size": 4, "micro_batch_size": 1, "rate": 0.5, "teachers": ["clip", "dino"]},
        ],
    },
]
TOTAL = 4 * 8 + 8 * 8 + 4 * 4


class Clock:
    """Stands still while nobody works."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Worker:
    """A teacher whose pass takes as many seconds as it sees pixels; the first one ever takes an hour more."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.facts, self.clock, self.is_warm = FACTS[name], clock, False

    def __call__(self, images_BCHW: Tensor) -> TeacherFeatures:
        batch, _, height, width = images_BCHW.shape
        self.clock.now_s += batch * height * width + 3600 * (not self.is_warm)
        self.is_warm = True
        grid = (height // self.facts.patch_size, width // self.facts.patch_size)
        return TeacherFeatures(None, torch.zeros(batch, grid[0] * grid[1], 1), grid)


def cost(run: VisionConfig, name: str) -> float:
    clock = Clock()
    substrate: Any = SimpleNamespace(device=torch.device("cpu"))
    panel = TeacherPanel(run.teachers, FACTS, {name: Worker(name, clock)}, substrate, None, torch.float32)
    return time_teacher(run, panel, name, clock)


def test_workloads_are_the_runs_own(tmp_path: Path) -> None:
    run = small_vision_run(tmp_path, stages=STAGES)
    assert count_workloads(run, "sam") == {Workload(32, 8): 32, Workload(32, 2): 64}
    assert count_workloads(run, "clip") == {Workload(32, 8): 32, Workload(32, 2): 64, Workload(40, 1): 8, Workload(48, 1): 8}


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        # Patches of 7 where the student has 8: 28 pixels for 32, 35 for 40, 42 for 48.
        ("clip", 96 * 28**2 + 8 * 35**2 + 8 * 42**2),
        # Its own 32 pixels, whatever the student has.
        ("dino", TOTAL * 32**2),
        # 2 x 2 images on 64 pixels: eight images fill two squares, two images take a whole one.
        ("sam", 32 * 64**2 / 4 + 64 * 64**2 / 2),
    ],
)
def test_costs_are_those_of_what_is_shown(name: str, seconds: float, tmp_path: Path) -> None:
    assert cost(small_vision_run(tmp_path, stages=STAGES), name) == pytest.approx(seconds / TOTAL)


def test_a_mosaic_gets_ranks_for_its_share_of_a_square(tmp_path: Path) -> None:
    """By its whole square, 64^2 an image, it would get 14 of 20 ranks."""
    run = small_vision_run(tmp_path, stages=STAGES[:1])
    duties = plan_teacher_ranks({name: cost(run, name) for name in run.teacher_names}, 20)
    ranks = [duty.teacher for (duty,) in duties]
    # 28^2 : 32^2 : 64^2 / 4.
    assert [ranks.count(name) for name in ("clip", "dino", "sam")] == [6, 7, 7]
