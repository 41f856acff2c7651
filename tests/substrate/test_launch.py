"""A run starts its ranks or joins those it is given; however it ends, it ends everywhere, with one message and one exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import torch

from megatron_hybrid.substrate import ExitCode
from megatron_hybrid.substrate.failure import describe_failure
from tests.substrate.runs import finish, refuse

LIMIT_S = 120
LAUNCHER_PREFIXES = ("SLURM_", "TORCHELASTIC_")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def command(entry: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "tests.substrate.runs", entry, *options]


def clean_environment(**variables: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER_PREFIXES) and key not in RANK_VARIABLES}
    # Three ranks at most; without a GPU for each, they run on the CPU.
    hidden = {} if torch.cuda.device_count() >= 3 else {"CUDA_VISIBLE_DEVICES": ""}
    return kept | hidden | variables


def launch(entry: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(entry, *options), env=clean_environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False)


@contextmanager
def launched(entry: str, *options: str, num_workers: int) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A launched run whose ranks are at work, and their process ids."""
    process = subprocess.Popen(command(entry, *options), env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(num_workers)]
        yield process, [int(line.split()[-1]) for line in lines]
    finally:
        process.kill()
        process.communicate()


def wait_until_gone(process_ids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE for number in process_ids):
        assert time.monotonic() < deadline, "ranks are still running"
        time.sleep(0.05)


def run_as_given_ranks(entry: str, options: list[str], environments: list[dict[str, str]]) -> list[tuple[int, str, str]]:
    """Start one process per environment, as a launcher would; return exit code, stdout and stderr of each."""
    processes = [
        subprocess.Popen(
            command(entry, *options), env=clean_environment(**environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for environment in environments
    ]
    try:
        ends = [process.communicate(timeout=LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]


def torchrun_environments(num_ranks: int) -> list[dict[str, str]]:
    shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(num_ranks)]


def slurm_environments(num_ranks: int) -> list[dict[str, str]]:
    shared = {
        "SLURM_STEP_NUM_TASKS": str(num_ranks),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": "1",
        "MASTER_PORT": str(free_port()),
    }
    return [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), **shared} for rank in range(num_ranks)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_plain_start_makes_the_ranks_of_the_layout() -> None:
    done = launch("finish", "tensor=2")
    assert done.returncode == ExitCode.FINISHED, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} of 2, tensor {rank}, all 2, by finish tensor=2" for rank in range(2)]
    assert done.stderr == ""


def test_one_rank_runs_in_this_process() -> None:
    with launched("work", num_workers=1) as (process, workers):
        assert workers == [process.pid]


def test_a_users_mistake_is_one_line() -> None:
    done = launch("refuse", "tensor=2")
    assert done.returncode == ExitCode.BAD_INPUT
    assert re.fullmatch(r"rank [01]: error: the corpus is empty\n", done.stderr)


@pytest.mark.parametrize("entry", ["break_on_one_rank", "break_beside_a_busy_rank"])
def test_a_failing_rank_ends_all_with_one_traceback(entry: str) -> None:
    started_s = time.monotonic()
    done = launch(entry, "tensor=2")
    assert time.monotonic() - started_s < 45
    assert done.returncode == ExitCode.ERROR
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.endswith("RuntimeError: broken on purpose\n")


def test_a_killed_rank_ends_all_and_is_named() -> None:
    done = launch("die_on_one_rank", "tensor=2")
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr == "rank 1 was ended by SIGKILL; if nobody sent it, the host ran out of memory\n"


def test_a_stop_signal_reaches_the_ranks() -> None:
    with launched("stop_when_asked", "tensor=2", num_workers=2) as (process, workers):
        process.send_signal(signal.SIGUSR1)
        output, errors = process.communicate(timeout=LIMIT_S)
        assert process.returncode == ExitCode.STOPPED, errors
        assert sorted(output.splitlines()) == [f"rank {rank} stopped with the others" for rank in range(2)]
        wait_until_gone(workers)


def test_a_stop_signal_that_nobody_takes_ends_the_run() -> None:
    with launched("work", "tensor=2", num_workers=2) as (process, workers):
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 128 + signal.SIGTERM
        assert re.fullmatch(r"rank [01] was ended by SIGTERM, which came before the run could take it as a request to save\n", errors)
        wait_until_gone(workers)


def test_an_interrupt_ends_all_ranks_without_a_traceback() -> None:
    with launched("work", "tensor=2", num_workers=2) as (process, workers):
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 128 + signal.SIGINT
        assert re.fullmatch(r"rank [01]: interrupted\n", errors)
        wait_until_gone(workers)


def test_ranks_do_not_outlive_a_killed_launcher() -> None:
    with launched("work", "tensor=2", num_workers=2) as (process, workers):
        process.kill()
        wait_until_gone(workers)


@pytest.mark.parametrize("environments", [torchrun_environments, slurm_environments])
def test_given_ranks_are_used(environments: Callable[[int], list[dict[str, str]]]) -> None:
    ends = run_as_given_ranks("finish", ["tensor=2"], environments(2))
    for rank, (code, output, errors) in enumerate(ends):
        assert code == ExitCode.FINISHED, errors
        assert output == f"rank {rank} of 2, tensor {rank}, all 2, by finish tensor=2\n"


def test_given_ranks_fail_together_and_one_speaks() -> None:
    ends = run_as_given_ranks("break_beside_a_busy_rank", ["tensor=2"], torchrun_environments(2))
    assert [code for code, _, _ in ends] == [ExitCode.ERROR] * 2
    assert "".join(errors for _, _, errors in ends).count("Traceback") == 1


def test_more_ranks_than_the_layout_uses_are_refused_everywhere() -> None:
    ends = run_as_given_ranks("finish", ["tensor=2", "data=1"], slurm_environments(3))
    assert [code for code, _, _ in ends] == [ExitCode.BAD_INPUT] * 3
    message = "".join(errors for _, _, errors in ends)
    assert message.count("\n") == 1
    assert "uses 2 rank(s), but 3 were started; start 2" in message


def test_a_rank_that_never_comes_ends_the_others_in_time() -> None:
    (code, _, errors), *_ = run_as_given_ranks("finish", ["tensor=2", "timeout_s=2"], torchrun_environments(2)[:1])
    assert code == ExitCode.ERROR
    assert "1 of 2 ranks did not come" in errors and "missing ranks 1" in errors


def test_a_broken_environment_is_one_line() -> None:
    ((code, _, errors),) = run_as_given_ranks("finish", [], [{"RANK": "0", "WORLD_SIZE": "2"}])
    assert code == ExitCode.BAD_INPUT
    assert errors == "error: LOCAL_RANK is not set in the environment; start the ranks with torchrun or srun, or set it\n"


def raised(function: Callable[..., Any], *arguments: Any) -> ValueError:
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    return caught.value


def test_only_our_own_value_errors_are_the_users() -> None:
    assert describe_failure(raised(refuse, None, None), refuse) == (ExitCode.BAD_INPUT, "error: the corpus is empty")
    code, text = describe_failure(raised(json.loads, "x"), refuse)
    assert code == ExitCode.ERROR and text.startswith("Traceback")


def test_missing_files_and_full_disks_are_one_line() -> None:
    assert describe_failure(FileNotFoundError(2, "No such file or directory", "corpus.bin"), finish) == (
        ExitCode.BAD_INPUT,
        "error: [Errno 2] No such file or directory: 'corpus.bin'",
    )
    assert describe_failure(OSError(28, "No space left on device", "x"), finish)[0] == ExitCode.ERROR
