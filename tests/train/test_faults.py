"""A run that is stopped, killed or diverges loses at most what came after its last checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_hybrid.config import dump_config
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.train.callback import Callback
from megatron_hybrid.train.callbacks.metrics_file import read_metrics
from tests.runs import small_run, write_corpus
from tests.train.training import KillAt, raised_by, train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "text")
    write_corpus(tmp_path / "held-out", seed=1)
    return tmp_path


class KillInValidation(Callback):
    """Sends SIGTERM when the first evaluation batch of a step is about to run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, trainer, record) -> None:
        if record.step == self.step:
            validation_data = trainer.task.validation_data

            def killing():
                os.kill(os.getpid(), signal.SIGUSR1)
                trainer.task.validation_data = validation_data
                return validation_data()

            trainer.task.validation_data = killing


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_one_rank_saves_and_stops_all(number: int, folder: Path, run_ranks) -> None:
    whole = run_ranks(train, 2, small_run(folder, run_dir=folder / "whole", parallel={"data": 2}))
    run = small_run(folder, parallel={"data": 2})
    stopped = run_ranks(train_with_kill_on_rank_one, 2, run, number)
    assert [outcome.exit_code for outcome in stopped] == [ExitCode.STOPPED] * 2
    assert [outcome.last_step for outcome in stopped] == [3, 3]
    rest = run_ranks(train, 2, run)
    assert stopped[0].losses + rest[0].losses == whole[0].losses


def train_with_kill_on_rank_one(run, number):
    return train(run, (KillAt(3, number),) if os.environ["RANK"] == "1" else ())


def test_signal_during_validation(folder: Path, run_ranks) -> None:
    run = small_run(folder, validation={"sources": {"held-out": folder / "held-out"}, "every_steps": 2, "num_batches": 2})
    (stopped,) = run_ranks(train_logged, 1, run, (KillInValidation(2),))
    assert (stopped.exit_code, stopped.last_step) == (ExitCode.STOPPED, 2)
    (rest,) = run_ranks(train_logged, 1, run, ())
    assert (rest.exit_code, rest.first_step, rest.last_step) == (ExitCode.FINISHED, 2, 5)
    lines = read_metrics(run.run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [4, 5]


class KillInSave(Callback):
    """Sends SIGTERM when the first checkpoint is about to be written."""

    def on_start(self, trainer) -> None:
        save = trainer.store.save

        def killing(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            trainer.store.save = save
            save(*arguments)

        trainer.store.save = killing


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_signal_during_save(asynchronous: bool, folder: Path, run_ranks) -> None:
    """The save is finished, and it is the one the run leaves with."""
    run = small_run(folder, checkpoint={"every_steps": 2, "asynchronous": asynchronous})
    (stopped,) = run_ranks(train, 1, run, (KillInSave(),))
    assert (stopped.exit_code, stopped.last_step) == (ExitCode.STOPPED, 2)
    assert [path.name for path in sorted((folder / "run" / "checkpoints").glob("step_*"))] == ["step_00000002"]
    (rest,) = run_ranks(train, 1, run)
    assert (rest.exit_code, rest.first_step) == (ExitCode.FINISHED, 2)


def train_logged(run, callbacks):
    return train(run, callbacks, logged=True)


def test_damaged_checkpoint_is_passed_over(folder: Path, run_ranks) -> None:
    run = small_run(folder, checkpoint={"every_steps": 2, "keep_last": None})
    (whole,) = run_ranks(train, 1, run)
    newest = folder / "run" / "checkpoints" / "step_00000005"
    shard = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (rest,) = run_ranks(train, 1, run)
    assert rest.first_step == 4
    assert rest.losses == whole.losses[4:]


def test_divergence_is_one_clear_error(folder: Path, run_ranks) -> None:
    run = small_run(folder, optimizer={"lr": 1e30, "clip_grad": 0.0}, checkpoint={"every_steps": 1})
    (message,) = run_ranks(raised_by, 1, train, run)
    assert "is nan" in message or "is inf" in message
    assert "samples from" in message and "checkpoint" in message


def test_a_save_under_way_survives_divergence(folder: Path, run_ranks) -> None:
    """The error names a checkpoint that is there, although the run ends while it is being written."""
    run = small_run(folder, optimizer={"lr": 1e30, "clip_grad": 0.0}, checkpoint={"every_steps": 1, "asynchronous": True})
    (message,) = run_ranks(raised_by, 1, train, run)
    assert "the last checkpoint is of step 1" in message
    assert (folder / "run" / "checkpoints" / "step_00000001" / "manifest.json").exists()


def test_resume_refuses_another_stream_or_model(folder: Path, run_ranks) -> None:
    run_ranks(train, 1, small_run(folder, train={"exit_after_steps": 1}))
    (message,) = run_ranks(raised_by, 1, train, small_run(folder, seed=7))
    assert "data.seed was 1234, is 7" in message
    (message,) = run_ranks(raised_by, 1, train, small_run(folder, model={"ffn_hidden_size": 128}))
    assert "ffn_hidden_size" in message and "96" in message and "128" in message
    (message,) = run_ranks(raised_by, 1, train, small_run(folder, train={"precision": "bf16"}))
    assert "precision" in message
    (message,) = run_ranks(raised_by, 1, train, small_run(folder, checkpoint={"resume": False}))
    assert "resume=false" in message and "step_00000001" in message


@pytest.mark.slow
def test_killed_command_continues(folder: Path) -> None:
    """The command as a user runs it, on two ranks: TERM mid-run gives 85 and a checkpoint, KILL later loses only what came after one; the
    end is as if nothing had happened."""
    config = folder / "run.yaml"
    config.write_text(
        dump_config(
            small_run(folder, parallel={"data": 2}, train={"steps": 400}, checkpoint={"every_steps": 20}, logging={"every_steps": 50})
        )
    )
    metrics = folder / "run" / "metrics.jsonl"
    assert interrupt(config, metrics, after_line=30, number=signal.SIGTERM) == ExitCode.STOPPED
    steps_at_stop = len(metrics.read_text().splitlines())
    assert interrupt(config, metrics, after_line=steps_at_stop + 30, number=signal.SIGKILL) == -signal.SIGKILL
    wait_for_ranks_to_end(metrics)
    command = [sys.executable, "-m", "megatron_hybrid", "pretrain", str(config), "train.steps=200"]
    last = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert last.returncode == 0, last.stderr
    assert "resumed from" in last.stderr
    assert [line["step"] for line in read_metrics(metrics)] == list(range(1, 201))


def interrupt(config: Path, metrics: Path, *, after_line: int, number: int) -> int:
    """Start the command, send it a signal once its metrics have so many lines, and return its exit code."""
    process = subprocess.Popen([sys.executable, "-m", "megatron_hybrid", "pretrain", str(config)], stdout=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s and (not metrics.exists() or len(metrics.read_text().splitlines()) < after_line):
        assert process.poll() is None, "ended before it was interrupted"
        time.sleep(0.05)
    process.send_signal(number)
    return process.wait(timeout=120)


def wait_for_ranks_to_end(metrics: Path) -> None:
    """Local ranks notice that their parent is gone and end; wait until the file has been still for a while."""
    size = -1
    while size != metrics.stat().st_size:
        size = metrics.stat().st_size
        time.sleep(3)
