"""Several ranks write and verify together, and none is left waiting when another's disk refuses."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from megatron_hybrid.checkpoint import CheckpointError, CheckpointStore, load
from megatron_hybrid.checkpoint.writing import ShardedWrite
from megatron_hybrid.substrate.groups import initialize
from tests.checkpoint.small_state import is_step, small_state
from tests.checkpoint.training_state import Kind, Layout, small_run


def start(num_ranks: int) -> None:
    initialize(small_run(Layout(data=num_ranks), Kind("fp32", False), seed=0))


def save(directory: Path, num_ranks: int, steps: list[int]) -> None:
    start(num_ranks)
    store = CheckpointStore(directory, keep_last=None, asynchronous=False)
    for step in steps:
        store.save(step, small_state(step), {"step": step})


def load_newest(directory: Path, num_ranks: int, step: int) -> tuple[str, bool]:
    start(num_ranks)
    newest = CheckpointStore(directory, keep_last=2, asynchronous=False).newest()
    return newest.name, is_step(load(newest, small_state(0)), step)


@contextmanager
def files_limited_to(size_bytes: int) -> Iterator[None]:
    """Have the kernel refuse to write more than this to any file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def metadata_refused() -> Iterator[None]:
    """Let the disk be full when only the files that join the shards are left to write."""
    with patch.object(ShardedWrite, "complete", side_effect=OSError(28, "File too large")):
        yield


def save_on_a_disk_that_refuses(directory: Path, failing_rank: int, what: str, asynchronous: bool) -> tuple[str, str]:
    start(2)
    store = CheckpointStore(directory, keep_last=2, asynchronous=asynchronous)
    store.save(1, small_state(1), {})
    store.finish_pending(blocking=True)
    message = ""
    refusal = metadata_refused() if what == "metadata" else files_limited_to(1000)
    with refusal if dist.get_rank() == failing_rank else nullcontext():
        try:
            store.save(2, small_state(2), {})
            store.finish_pending(blocking=True)
        except CheckpointError as error:
            message = str(error)
    assert is_step(load(store.newest(), small_state(0)), 1)
    store.save(3, small_state(3), {})
    store.finish_pending(blocking=True)
    return message, store.newest().name


@pytest.mark.parametrize(("saving_ranks", "loading_ranks"), [(1, 4), (4, 1), (2, 4), (4, 2)])
def test_any_number_of_ranks_reads_what_any_number_wrote(
    saving_ranks: int, loading_ranks: int, tmp_path: Path, run_ranks: Callable
) -> None:
    run_ranks(save, saving_ranks, tmp_path, saving_ranks, [5])
    assert run_ranks(load_newest, loading_ranks, tmp_path, loading_ranks, 5) == [("step_00000005", True)] * loading_ranks


def test_ranks_agree_on_the_newest_whoever_finds_the_damage(tmp_path: Path, run_ranks: Callable) -> None:
    run_ranks(save, 2, tmp_path, 2, [1, 2, 3])
    for step, name in ((3, "__1_0.distcp"), (2, "common.pt")):
        os.truncate(tmp_path / f"step_{step:08d}" / name, 50)
    assert run_ranks(load_newest, 2, tmp_path, 2, 1) == [("step_00000001", True)] * 2


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("failing_rank", "what"), [(1, "shards"), (0, "shards"), (0, "metadata")])
def test_a_disk_that_refuses_one_rank_is_an_error_of_all(
    failing_rank: int, what: str, asynchronous: bool, tmp_path: Path, run_ranks: Callable
) -> None:
    for message, newest in run_ranks(save_on_a_disk_that_refuses, 2, tmp_path, failing_rank, what, asynchronous):
        assert f"could not write step_00000002 to {tmp_path}" in message
        assert "bytes needed" in message and "available" in message and "File too large" in message
        assert newest == "step_00000003"
