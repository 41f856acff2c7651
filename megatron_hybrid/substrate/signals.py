"""Asking a run to save and stop: SIGTERM (schedulers, people) and SIGUSR1 (SLURM's warning before the time limit)."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from megatron_hybrid.substrate.context import Substrate

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that a stop signal came, to this rank or any other. Construct it in the main thread; from then on the signals do not kill.

    ``requested`` is the place where the ranks agree, so all of them must call it at the same points: before each step, evaluation batch and
    save. A signal to one rank is then seen by all ranks at the same point.
    """

    def __init__(self, substrate: Substrate) -> None:
        self._group = substrate.control_group
        self._world_size = substrate.world_size
        self._received = False
        self._agreed = False
        self._previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}

    def requested(self) -> bool:
        """Return whether any rank was asked to stop. A collective call over all ranks; once true it stays true."""
        if not self._agreed:
            self._agreed = self._received if self._world_size == 1 else self._any_rank_received()
        return self._agreed

    def close(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _any_rank_received(self) -> bool:
        received = torch.tensor([self._received], dtype=torch.int32)
        dist.all_reduce(received, dist.ReduceOp.MAX, group=self._group)
        return bool(received.item())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
