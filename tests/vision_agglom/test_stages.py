"""From one stage to the next: a teacher that comes later, and a stop at the boundary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vision_agglom.small import small_vision_run
from tests.vision_agglom.test_layout_parity import check
from tests.vision_agglom.test_resume import stopped
from tests.vision_agglom.training import train_vision


def stage(steps: int, resolutions: list[int], teachers: list[str]) -> dict[str, Any]:
    partition = {"resolutions": resolutions, "batch_size": 4, "micro_batch_size": 2, "teachers": teachers}
    return {"steps": steps, "decay": "constant", "partitions": [partition]}


STAGES = [stage(3, [32], ["clip"]), stage(2, [32, 48], ["clip", "dino"]), stage(1, [48], ["clip", "dino", "sam"])]
"""AM-RADIO's manner: more teachers with every stage."""
STATISTICS = {"steps": 2, "refresh_steps": 1}


def test_a_stop_at_a_boundary_changes_nothing(tmp_path: Path, run_ranks) -> None:
    (whole,) = run_ranks(train_vision, 1, small_vision_run(tmp_path / "whole", stages=STAGES, statistics=STATISTICS))
    halves = small_vision_run(tmp_path / "halves", stages=STAGES, statistics=STATISTICS)
    (first,) = run_ranks(train_vision, 1, stopped(halves, 3))
    (second,) = run_ranks(train_vision, 1, halves)
    assert first.losses + second.losses == whole.losses
    for name, values in whole.state.items():
        np.testing.assert_array_equal(second.state[name], values, err_msg=name)
    # The head's space is that of the stage it first learned in, and stays.
    for part in ("forward", "inverse", "offset"):
        np.testing.assert_array_equal(whole.state[f"targets.clip.head.{part}"], first.state[f"targets.clip.head.{part}"])
    assert not first.state["targets.sam.head.is_set"][0] and whole.state["targets.sam.head.is_set"][0]
    assert np.abs(whole.state["targets.clip.targets.forward"] - whole.state["targets.clip.head.forward"]).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"data": 2}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}], ids=["dp2", "tp2-sp", "pp2"])
def test_stages_in_every_layout(layout: dict[str, Any], tmp_path: Path, run_ranks) -> None:
    (reference,) = run_ranks(train_vision, 1, small_vision_run(tmp_path / "one", stages=STAGES, statistics=STATISTICS))
    check(small_vision_run(tmp_path / "other", stages=STAGES, statistics=STATISTICS, parallel=layout), reference, run_ranks)


def refused(run) -> str:
    from tests.train.training import raised_by

    return raised_by(train_vision, run)


def test_other_statistics_are_refused(tmp_path: Path, run_ranks) -> None:
    run = small_vision_run(tmp_path)
    run_ranks(train_vision, 1, stopped(run, 1))
    other = run.model_copy(update={"statistics": run.statistics.model_copy(update={"steps": 2})})
    (message,) = run_ranks(refused, 1, other)
    assert "statistics.steps is 3 there and 2 here; restore these options" in message


def test_a_width_without_hadamard_matrix_names_its_teacher(tmp_path: Path, run_ranks, monkeypatch) -> None:
    (message,) = run_ranks(_refused_width, 1, small_vision_run(tmp_path))
    assert "teacher 'clip': no Hadamard matrix of order 92 is known here" in message


def _refused_width(run) -> str:
    from dataclasses import replace

    from megatron_hybrid.substrate.groups import initialize, shutdown
    from tests.vision_agglom.small import FACTS
    from vision_agglom.targets.tracker import TargetTracker

    substrate = initialize(run)
    try:
        TargetTracker(run.teachers[0], replace(FACTS["clip"], spatial_channels=92), run.statistics, substrate)
    except ValueError as error:
        return str(error)
    finally:
        shutdown(substrate)
    return "accepted"
