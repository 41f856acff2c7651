"""Float8 products in the student's linears, emulated on the CPU: they run, train, and say which shapes they cannot take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.vision_agglom.small import small_vision_run
from tests.vision_agglom.training import train_vision
from vision_agglom.students.build import length_multiple, plan_float8

FP8 = {"recipe": "current", "bf16_layers_at_start": 1, "linears": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]}


def test_losses_are_near_those_of_full_precision(tmp_path: Path, run_ranks) -> None:
    """Filled up to multiples of 16 tokens, which no micro-batch of one image would have by itself."""
    (exact,) = run_ranks(train_vision, 1, small_vision_run(tmp_path / "exact"))
    (rounded,) = run_ranks(train_vision, 1, small_vision_run(tmp_path / "rounded", fp8=FP8))
    assert rounded.losses != exact.losses
    np.testing.assert_allclose(rounded.losses, exact.losses, rtol=0.05)


def test_the_plan_leaves_out_end_layers_and_refuses_odd_widths(tmp_path: Path) -> None:
    run = small_vision_run(tmp_path, fp8=FP8)
    assert [len(names) for names in plan_float8(run)] == [0, 4, 4, 4]
    assert length_multiple(run) == 16
    with pytest.raises(ValueError, match="linear_fc1 is 40 x 32 per rank .*multiples of 16"):
        plan_float8(small_vision_run(tmp_path, fp8=FP8, student={"ffn_hidden_size": 40}))


def test_reports_of_language_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fp8.telemetry_every_steps is not read here"):
        small_vision_run(tmp_path, fp8={**FP8, "telemetry_every_steps": 1})
