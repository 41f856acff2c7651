"""The gap between trainings that differ in their arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.fp8_loss_gap import BASELINE, CONTROL, Losses, describe, gap_to, main, variants
from megatron_hybrid.config import load_config

STEPS = 50


def falling(factor: float = 1.0) -> Losses:
    return Losses(factor * np.linspace(4.0, 2.0, STEPS), factor * 2.1)


def test_a_loss_that_is_higher_by_a_share_has_that_gap_everywhere() -> None:
    gap = gap_to(falling(), falling(1.001), window=20)
    assert gap.windows == pytest.approx([-1e-3] * 2)  # the last ten steps fill no window
    assert (gap.last_tenth, gap.validation) == (pytest.approx(-1e-3), pytest.approx(-1e-3))


def test_windows_average_what_lies_in_them() -> None:
    other = falling()
    other.training[20:40] *= 0.98
    assert gap_to(falling(), other, window=20).windows == pytest.approx([0.0, 0.02])


@pytest.mark.parametrize(("other", "window"), [(Losses(np.ones(STEPS - 1), 1.0), 20), (falling(), STEPS + 1)])
def test_trainings_of_other_lengths_and_windows_longer_than_them_are_refused(other: Losses, window: int) -> None:
    with pytest.raises(ValueError, match=f"cannot be compared over windows of {window}"):
        gap_to(falling(), other, window)


def test_the_trainings_differ_in_their_arithmetic_alone() -> None:
    options = variants(load_config("examples/quickstart/config.yaml"), bf16_layers=2)
    assert options[BASELINE] == [] and options[CONTROL] == ["train.micro_batch_size=2"]
    for name, each in options.items():
        run = load_config("examples/quickstart/config.yaml", each)
        baseline = load_config("examples/quickstart/config.yaml", options[BASELINE])
        kept = baseline.model_copy(update={"fp8": run.fp8, "train": run.train})
        assert run == kept and run.train.micro_batch_size == (2 if name == CONTROL else 4)


def test_wrong_options_end_before_any_training(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--window", "900"], "--window 900 is longer than the training of 600 steps"),
        (["--option", "train.micro_batch_size=1"], "train.micro_batch_size=1: expected an even one"),
        (["--option", "train.stepz=1"], "did you mean 'train.steps'?"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert message in capsys.readouterr().err


def test_the_table_names_every_training() -> None:
    losses = {BASELINE: falling(), CONTROL: falling(1.0001)}
    table = describe(losses, {CONTROL: gap_to(losses[BASELINE], losses[CONTROL], 20)})
    assert "-0.010%" in table and all(name in table for name in losses)
