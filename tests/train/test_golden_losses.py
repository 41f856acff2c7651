"""Losses of fixed runs, as data: a change in numerics shows here before anyone trains with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.golden.make_losses import GOLDEN, NUM_STEPS, RUNS
from tests.runs import small_run, write_corpus
from tests.train.layouts import train_in_layout

# Rounding differs between processors' vector units; over 30 steps that grows, in bf16 more.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "fp32-rope-whole-samples": 1e-4, "fp8-delayed": 2e-2}


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_as_recorded(name: str, tmp_path: Path, run_ranks) -> None:
    write_corpus(tmp_path / "text")
    (report,) = run_ranks(train_in_layout, 1, small_run(tmp_path, **RUNS[name]), NUM_STEPS)
    golden = json.loads(GOLDEN.read_text())["losses"][name]
    np.testing.assert_allclose(report.losses, golden, rtol=TOLERANCES[name])
    assert report.losses[-1] < report.losses[0] - 0.3, "the model does not learn"
