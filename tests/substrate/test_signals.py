"""A stop signal is remembered, and all ranks learn of it at the same point."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from megatron_hybrid.substrate import StopRequest
from megatron_hybrid.substrate.groups import initialize, shutdown
from tests.substrate.runs import small_run


def polls_around_a_signal(number: signal.Signals, rank_signalled: int) -> list[bool]:
    before = signal.getsignal(number)
    substrate = initialize(small_run())
    stop = StopRequest(substrate)
    polls = [stop.requested()]
    if substrate.rank == rank_signalled:
        os.kill(os.getpid(), number)
    polls += [stop.requested(), stop.requested()]
    stop.close()
    assert signal.getsignal(number) is before
    shutdown(substrate)
    return polls


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(("world_size", "rank_signalled"), [(1, 0), (2, 0), (2, 1)])
def test_a_signal_to_one_rank_reaches_all(
    run_ranks: Callable[..., list[Any]], number: signal.Signals, world_size: int, rank_signalled: int
) -> None:
    assert run_ranks(polls_around_a_signal, world_size, number, rank_signalled) == [[False, True, True]] * world_size
