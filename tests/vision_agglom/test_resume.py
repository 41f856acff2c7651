"""A stopped distillation goes on as if it had not stopped: weights bitwise, statistics and all; other targets are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_hybrid.checkpoint.store import step_name
from tests.train.training import raised_by
from tests.vision_agglom.small import small_vision_run
from tests.vision_agglom.test_layout_parity import EVERYTHING
from tests.vision_agglom.training import train_vision
from vision_agglom import task
from vision_agglom.config.schema import VisionConfig

MESA = {"loss": {"balance": "adaloss", "mesa": {"weight": 0.5, "momentum": 0.9}, "shift_patches": 1}}


def stopped(run: VisionConfig, steps: int) -> VisionConfig:
    return run.model_copy(update={"train": run.train.model_copy(update={"exit_after_steps": steps})})


@pytest.mark.parametrize("sections", [EVERYTHING, MESA], ids=["everything", "mesa"])
def test_resume_is_bitwise(sections: dict[str, Any], tmp_path: Path, run_ranks) -> None:
    """Stopped while statistics are still gathered, which end after step 3."""
    (whole,) = run_ranks(train_vision, 1, small_vision_run(tmp_path / "whole", **sections))
    halves = small_vision_run(tmp_path / "halves", **sections)
    (first,) = run_ranks(train_vision, 1, stopped(halves, 2))
    (second,) = run_ranks(train_vision, 1, halves)
    assert first.losses + second.losses == whole.losses
    for kind in ("weights", "state"):
        for name, values in getattr(whole, kind).items():
            np.testing.assert_array_equal(getattr(second, kind)[name], values, err_msg=name)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"tensor": 2, "sequence_parallel": True}, id="tp2"),
        pytest.param({"pipeline": 2}, id="pp2", marks=pytest.mark.slow),
        pytest.param({"data": 2}, id="dp2", marks=pytest.mark.slow),
    ],
)
def test_resume_in_another_layout(layout: dict[str, Any], tmp_path: Path, run_ranks) -> None:
    (whole,) = run_ranks(train_vision, 1, small_vision_run(tmp_path / "whole", **EVERYTHING))
    run_ranks(train_vision, 1, stopped(small_vision_run(tmp_path / "halves", **EVERYTHING), 2))
    reports = run_ranks(train_vision, 2, small_vision_run(tmp_path / "halves", parallel=layout, **EVERYTHING))
    for report in reports:
        np.testing.assert_allclose(report.losses, whole.losses[2:], rtol=1e-5)


def test_a_file_that_a_new_run_starts_from_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been moved, or be one that is now refused."""
    monkeypatch.setattr(task, "build_student_chunks", lambda *_: [])
    run = small_vision_run(tmp_path, student={"initialize_from": tmp_path / "moved.pth"})
    distillation: Any = SimpleNamespace(run=run, config=None, substrate=None, head_shapes=list)
    with pytest.raises(ValueError, match="student.initialize_from=.*No such file"):
        task.Distillation.build_chunks(distillation)
    (run.run_dir / "checkpoints" / step_name(2)).mkdir(parents=True)
    assert task.Distillation.build_chunks(distillation) == []


def refusal(run: VisionConfig) -> str:
    return raised_by(train_vision, run)


def test_other_targets_are_refused(tmp_path: Path, run_ranks) -> None:
    """One of the options that tests/vision_agglom/test_fingerprint.py goes through."""
    run = small_vision_run(tmp_path)
    run_ranks(train_vision, 1, stopped(run, 1))
    teachers = (run.teachers[0].model_copy(update={"standardizer": "zca"}), *run.teachers[1:])
    (message,) = run_ranks(refusal, 1, run.model_copy(update={"teachers": teachers}))
    assert "teachers.clip.standardizer is 'phi_s' there and 'zca' here" in message


def test_views_that_teachers_do_not_take(tmp_path: Path, run_ranks) -> None:
    run = small_vision_run(tmp_path)
    matching = run.teachers[2].model_copy(update={"view": "match"})
    (message,) = run_ranks(refusal, 1, run.model_copy(update={"teachers": (*run.teachers[:2], matching)}))
    assert "teacher 'sam' takes images of 64 pixels only" in message and "view=own (resized images) or view=mosaic" in message
