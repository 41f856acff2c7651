"""A signal while a verb is importing or loading ends it at once, on all ranks, with one line and no traceback."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megatron_hybrid.config import dump_config
from tests.runs import small_run

VERBS = {
    "evaluate": ("RUN", "--tasks", "arc_easy"),
    "generate": ("RUN", "--prompt", "t1"),
    "pretrain": ("RUN/config.yaml",),
    "serve": ("RUN", "--port", "0"),
}
LIMIT_S = 240
SLOW_TORCH = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory whose checkpoint cannot be read to its end: its header is a pipe that nothing is written to."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(dump_config(small_run(tmp_path)))
    os.mkfifo(checkpoint / "header.json")
    return tmp_path / "run"


@contextmanager
def started(verb: str, run_dir: Path, *options: str, path: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A verb's process, with ``path`` before all packages."""
    arguments = [word.replace("RUN", str(run_dir)) for word in VERBS[verb]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-m", "megatron_hybrid", verb, *arguments, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        for each in (*psutil.Process(process.pid).children(recursive=True), process) if process.poll() is None else (process,):
            each.kill()
        process.communicate()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not get that far"
        time.sleep(0.01)


def is_loading(run_dir: Path) -> bool:
    """Whether somebody reads the checkpoint's header."""
    try:
        os.close(os.open(run_dir / "checkpoints/step_00000001/header.json", os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        assert error.errno == errno.ENXIO, error
        return False
    return True


@pytest.mark.parametrize("verb", VERBS)
def test_while_importing(verb: str, run_dir: Path, tmp_path: Path) -> None:
    # In the place of torch, a module that takes long.
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "torch.py").write_text(SLOW_TORCH)
    with started(verb, run_dir, path=tmp_path / "slow") as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (130, "interrupted\n")


def test_while_local_ranks_are_importing(run_dir: Path) -> None:
    with started("generate", run_dir, "--tensor", "2") as process:
        # Beside the ranks there is Python's tracker of resources.
        wait_until(lambda: len(psutil.Process(process.pid).children()) == 3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("number", "options"), [(signal.SIGTERM, ()), pytest.param(signal.SIGTERM, ("--tensor", "2"), marks=pytest.mark.slow)]
)
def test_while_the_server_is_loading(number: signal.Signals, options: tuple[str, ...], run_dir: Path) -> None:
    with started("serve", run_dir, *options) as process:
        wait_until(lambda: is_loading(run_dir))
        process.send_signal(number)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (128 + number, "interrupted\n")
