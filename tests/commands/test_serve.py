"""From loading to serving: which signals end a rank at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from torch import distributed as dist

from megatron_hybrid.commands.serve import _STOP_SIGNALS, _stop_together
from megatron_hybrid.interruption import leave_at_once_on


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The signals that would have ended this process at once, as a rank that is loading has it."""
    left: list[int] = []
    monkeypatch.setattr("megatron_hybrid.interruption._leave", lambda number, frame: left.append(number))
    before = [(number, signal.getsignal(number)) for number in _STOP_SIGNALS]
    leave_at_once_on(*_STOP_SIGNALS)
    yield left
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize("number", _STOP_SIGNALS)
def test_once_all_ranks_are_ready_none_leaves_by_itself(number: int, left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    # It comes before this rank knows that the others go on.
    monkeypatch.setattr(dist, "barrier", lambda group: os.kill(os.getpid(), number))
    came = _stop_together(None)
    assert (came, left) == ([number], [])
    os.kill(os.getpid(), signal.SIGTERM)
    assert (came, left) == ([number, signal.SIGTERM], [])


@pytest.mark.parametrize("came", [(), (signal.SIGTERM,)])
def test_a_rank_leaves_with_one_that_did_while_loading(came: tuple[int, ...], left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def barrier(group: None) -> None:
        for number in came:
            os.kill(os.getpid(), number)
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "barrier", barrier)
    with pytest.raises(RuntimeError, match="closed by peer"):
        _stop_together(None)
    assert left == list(came)
