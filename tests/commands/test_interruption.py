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
SLOW_MODULE = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
SLOW_ON_RANKS = f"import os\nif 'RANK' in os.environ:\n    exec({SLOW_MODULE!r})\n"


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
    # These tests may themselves have been started in a shell's background, where SIGINT is ignored, and what is ignored stays so.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
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


@contextmanager
def loading(process: subprocess.Popen[str], run_dir: Path, num_ranks: int) -> Iterator[None]:
    """Every rank reads the checkpoint's header, to whose end it does not come as long as this is open."""
    header, writing = run_dir / "checkpoints/step_00000001/header.json", []

    def is_read() -> bool:
        try:
            writing.append(os.open(header, os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:
            assert error.errno == errno.ENXIO, error
        return bool(writing)

    wait_until(is_read)
    try:
        wait_until(lambda: num_readers(process, header) == num_ranks)
        yield
    finally:
        os.close(writing[0])


def num_readers(process: subprocess.Popen[str], file: Path) -> int:
    parent = psutil.Process(process.pid)
    return sum(file in map(Path.resolve, Path(f"/proc/{each.pid}/fd").glob("*")) for each in (parent, *parent.children()))


@pytest.mark.parametrize("verb", VERBS)
def test_while_importing(verb: str, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(SLOW_MODULE)
    with started(verb, run_dir, path=tmp_path) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (130, "interrupted\n")


def test_while_local_ranks_are_importing(run_dir: Path, tmp_path: Path) -> None:
    # In the place of a package that every process imports and none gets as far as using.
    (tmp_path / "tokenizers.py").write_text(SLOW_ON_RANKS)
    with started("pretrain", run_dir, "parallel.tensor=2", path=tmp_path) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["importing\n"] * 2
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (130, "interrupted\n")


@pytest.mark.parametrize("options", [(), pytest.param(("--tensor", "2"), marks=pytest.mark.slow)])
def test_while_the_server_is_loading(options: tuple[str, ...], run_dir: Path) -> None:
    with started("serve", run_dir, *options) as process:
        with loading(process, run_dir, num_ranks=2 if options else 1):
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (128 + signal.SIGTERM, "interrupted\n")
