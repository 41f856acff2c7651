"""What every test has: a pool of ranks for parallel tests, and a limit on its own time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is first imported, by whichever test comes first, whether kernels are compiled or interpreted
    os.environ["TRITON_INTERPRET"] = "1"

from tests.distributed import RankPool  # noqa: E402 - imports megatron-core, which imports triton

TEST_LIMIT_S = 300


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Ranks that are started once per session."""
    with RankPool() as pool:
        yield pool


@pytest.fixture
def run_ranks(rank_pool: RankPool) -> Callable[..., list[Any]]:
    """``run_ranks(fn, world_size, *args, timeout_s=120)``: results by rank of a module-level function; see ``RankPool.run``."""
    return rank_pool.run


@pytest.fixture
def device() -> str:
    """Where Triton kernels run here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _time_limit() -> Iterator[None]:
    """Fail a test that hangs, instead of the whole session."""

    def stop(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"took longer than {TEST_LIMIT_S} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(TEST_LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
