"""What a run says: aligned lines, complete records, a curve."""

from __future__ import annotations

import importlib.machinery
import json
import math
import sys
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.train.callbacks.console import format_duration, format_record
from megatron_hybrid.train.callbacks.loss_curve import draw_loss_curve
from megatron_hybrid.train.callbacks.metrics_file import read_metrics
from megatron_hybrid.train.callbacks.tensorboard import TensorBoardLog, scalars
from megatron_hybrid.train.callbacks.wandb import WandbLog
from megatron_hybrid.train.progress import Progress, StepRecord
from megatron_hybrid.train.step import StepResult
from megatron_hybrid.train.trainer import TrainState
from tests.runs import small_run, write_corpus
from tests.train.training import train

RECORD = StepRecord(
    step=7,
    total_steps=200,
    tokens=7 * 2048,
    samples=56,
    total_samples=1600,
    metrics={"loss": 6.25},
    grad_norm=1.5,
    learning_rate=3e-4,
    step_s=0.5,
    warm_up=None,
    tokens_per_s=4096.0,
    tflops_per_rank=0.25,
    mfu=None,
    memory_gib=0.5,
    eta_s=96.5,
    data_hash="00ff",
)


def test_lines_align() -> None:
    first, last = (
        format_record(RECORD),
        format_record(replace(RECORD, step=200, samples=1600, metrics={"loss": 12.5}, tokens_per_s=123456.0)),
    )
    assert "step 7/200" in first and "loss   6.2500" in first and "4.1K tok/s" in first and "eta 1:36" in first
    for word in ("loss", "grad", "lr", "tok/s", "TFLOP/s", "GiB", "data", "eta"):
        assert first.index(word) == last.index(word), word


def test_a_warm_up_has_its_time_instead_of_rates() -> None:
    rates = dict.fromkeys(("tokens_per_s", "tflops_per_rank", "mfu", "eta_s"))
    line = format_record(replace(RECORD, step_s=16.62, warm_up="kernels are compiled", **rates))
    assert line.endswith("lr 3.00e-04  warm-up: 16.6 s (kernels are compiled)") and line.startswith(format_record(RECORD)[:40])


def test_rates_and_time_left_are_of_the_steps_after_the_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = iter([0.0, 20.0, 25.0, 27.0, 31.0])
    monkeypatch.setattr("megatron_hybrid.train.progress.time.perf_counter", lambda: next(clock_s))
    run = small_run(tmp_path, train={"steps": 10}, logging={"peak_tflops": 2.0})
    progress = Progress(run, 1e12, SimpleNamespace(device=torch.device("cpu"), world_size=1))
    per_step, records = run.train.global_batch_size, []
    for step, warm_up in enumerate(("compiles", "captures", None, None), start=1):
        state, result = TrainState(step, step * per_step), StepResult({"loss": 5.0}, 1.0, 0)
        records.append(progress.record(state, result, 1e-3, per_step, warm_up))
    assert [record.step_s for record in records] == [20, 5, 2, 4]
    for record in records[:2]:
        assert (record.tokens_per_s, record.tflops_per_rank, record.mfu, record.eta_s) == (None, None, None, None)
        assert not any(name in scalars(record) for name in ("speed/tokens_per_s", "speed/tflops_per_rank", "speed/mfu"))
    assert [record.tokens_per_s for record in records[2:]] == [run.tokens_per_step / 2, run.tokens_per_step / 4]
    assert [record.mfu for record in records[2:]] == [per_step / 4, per_step / 8] and "speed/mfu" in scalars(records[2])
    assert [record.eta_s for record in records[2:]] == [7 * 2, 6 * 3]


def test_mfu_is_shown_where_the_peak_is_known() -> None:
    assert "(53.7%)" in format_record(replace(RECORD, mfu=0.537))
    assert "%" not in format_record(RECORD)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3725, "1:02:05"), (200000, "2d 07:33")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_run_leaves_metrics_curve_and_events(tmp_path: Path, run_ranks) -> None:
    write_corpus(tmp_path / "text")
    write_corpus(tmp_path / "held-out", seed=1)
    validation = {"sources": {"held-out": tmp_path / "held-out", "text": tmp_path / "text"}, "every_steps": 2, "num_batches": 1}
    run = small_run(tmp_path, validation=validation, logging={"tensorboard": True}, parallel={"pipeline": 2})
    outcomes = run_ranks(train_logged, 2, run)
    assert outcomes[0].exit_code == ExitCode.FINISHED
    lines = read_metrics(run.run_dir / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["metrics"]["loss"] for line in steps] == outcomes[0].losses
    assert [line["samples"] for line in steps] == [8, 16, 24, 32, 40]
    assert [line["warm_up"] is None for line in steps] == [line["eta_s"] is not None for line in steps] == [False] + [True] * 4
    validations = [line for line in lines if line["kind"] == "validation"]
    assert [(line["step"], set(line["losses"])) for line in validations] == [(step, {"held-out", "text"}) for step in (2, 4, 5)]
    assert (run.run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run.run_dir / "tensorboard").iterdir())


def test_validation_sees_the_last_update(tmp_path: Path, run_ranks) -> None:
    """With overlapped gathering, too, where each rank's copy of the others' shards is a step behind until the next forward."""
    write_corpus(tmp_path / "text")
    write_corpus(tmp_path / "held-out", seed=1)
    losses = []
    for number, overlap in enumerate((False, True)):
        run = small_run(
            tmp_path,
            run_dir=tmp_path / f"run{number}",
            validation={"sources": {"held-out": tmp_path / "held-out"}, "every_steps": 1, "num_batches": 1},
            parallel={"data": 2, "overlap_grad_reduce": overlap, "overlap_param_gather": overlap},
        )
        run_ranks(train_logged, 2, run)
        losses.append([line["losses"]["held-out"] for line in read_metrics(run.run_dir / "metrics.jsonl") if line["kind"] == "validation"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_batch_size_changed_on_the_way(tmp_path: Path, run_ranks) -> None:
    """The run still ends by samples, with its last validation, and the step count says when."""
    write_corpus(tmp_path / "text")
    validation = {"sources": {"text": tmp_path / "text"}, "every_steps": 100, "num_batches": 1}
    run_ranks(train_logged, 1, small_run(tmp_path, validation=validation, train={"steps": 4, "exit_after_steps": 1}))
    (rest,) = run_ranks(train_logged, 1, small_run(tmp_path, validation=validation, train={"steps": 2, "global_batch_size": 16}))
    assert (rest.first_step, rest.last_step) == (1, 3), "24 samples are left, and a step takes 16"
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["total_steps"] for line in lines if line["kind"] == "step"] == [4, 3, 3]
    assert lines[-1]["kind"] == "validation"


def train_logged(run):
    return train(run, logged=True)


def test_wandb_continues_one_run_per_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the package, which is not a dependency."""
    started: list[dict] = []
    package = types.ModuleType("wandb")
    package.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    package.init = lambda **options: started.append(options)
    monkeypatch.setitem(sys.modules, "wandb", package)
    for name in ("a/model", "b/model", "a/model"):
        WandbLog(small_run(tmp_path, run_dir=tmp_path / name, logging={"wandb_project": "hybrids"})).on_start(None)
    assert [options["project"] for options in started] == ["hybrids"] * 3
    assert started[0]["id"] == started[2]["id"] != started[1]["id"]
    assert started[0]["resume"] == "allow"


def test_reports_reach_both_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    shown: dict[str, dict] = {"tensorboard": {}, "wandb": {}}
    events, curves = TensorBoardLog(run), WandbLog(run)
    events.writer = SimpleNamespace(add_scalar=lambda name, value, step: shown["tensorboard"].update({(name, step): value}))
    curves.run = SimpleNamespace(log=lambda values, step: shown["wandb"].update({(name, step): value for name, value in values.items()}))
    trainer = SimpleNamespace(state=TrainState(step=20))
    for callback in (events, curves):
        callback.on_report(trainer, "fp8", {"linears": {"decoder.layers.0.mixer.in_proj": {"input": {"amax": 2.5, "saturated": 0.0}}}})
        callback.on_report(trainer, "fp8_shadow", {"exact_loss": None, "relative_gap": -1e-4})
    assert str(shown["tensorboard"]) == str(shown["wandb"])
    assert shown["wandb"]["fp8/linears/decoder.layers.0.mixer.in_proj/input/amax", 20] == 2.5
    assert shown["wandb"]["fp8_shadow/relative_gap", 20] == -1e-4 and math.isnan(shown["wandb"]["fp8_shadow/exact_loss", 20])


def test_missing_logger_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the wandb package"):
        WandbLog(small_run(tmp_path, logging={"wandb_project": "hybrids"}))


def test_curve_survives_a_line_cut_short(tmp_path: Path) -> None:
    line = {"kind": "step", "step": 1, "tokens": 320, "metrics": {"loss": 5.0}, "learning_rate": 1e-3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line)[:20])
    draw_loss_curve(tmp_path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()
