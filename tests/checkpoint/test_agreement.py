"""What fails on one rank fails on all of them, at once and with one message."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.distributed as dist

from megatron_hybrid.checkpoint.agreement import CheckpointError, failing_together, gather
from megatron_hybrid.substrate.groups import initialize
from tests.checkpoint.training_state import Kind, Layout, small_run

RUN = small_run(Layout(data=2), Kind("fp32", False), seed=0)


def fail_on(ranks: list[int], error: Exception) -> tuple[str, str]:
    initialize(RUN)
    began_s = time.monotonic()
    try:
        with failing_together():
            if dist.get_rank() in ranks:
                raise error
    except (ValueError, CheckpointError) as raised:
        assert time.monotonic() - began_s < RUN.runtime.timeout_s / 2
        return type(raised).__name__, str(raised)
    return "", ""


def gather_ranks() -> list[int]:
    initialize(RUN)
    return gather(dist.get_rank())


def test_one_failing_rank_fails_all_without_a_wait(run_ranks: Callable) -> None:
    outcomes = run_ranks(fail_on, 2, [1], OSError(28, "No space left on device", "file"))
    assert outcomes == [("CheckpointError", "OSError: [Errno 28] No space left on device: 'file'")] * 2


def test_a_users_mistake_stays_one(run_ranks: Callable) -> None:
    assert run_ranks(fail_on, 2, [0, 1], ValueError("no such thing")) == [("ValueError", "no such thing")] * 2


def test_without_failure_nothing_is_raised(run_ranks: Callable) -> None:
    assert run_ranks(fail_on, 2, [], ValueError()) == [("", "")] * 2


def test_gather_is_in_rank_order(run_ranks: Callable) -> None:
    assert run_ranks(gather_ranks, 2) == [[0, 1]] * 2
