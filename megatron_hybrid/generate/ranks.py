"""One rank decides, the others follow: what the first rank's engine is told to do, every rank's engine does.

Requests arrive, stop and are cancelled on the first rank alone; no other rank needs to know why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from megatron_hybrid.generate.engine import Engine, Start, StepTokens
from megatron_hybrid.generate.score import Score

_LEAVE, _NOTHING = "leave", "nothing"


class Leader:
    """The first rank's engine, and through it every other rank's; used like an ``Engine``.

    Args:
        engine: of this rank.
        group: all ranks, over gloo.
    """

    def __init__(self, engine: Engine, group: dist.ProcessGroup) -> None:
        self._engine, self._group = engine, group
        self.max_batch_size, self.max_length, self.prefill_tokens = engine.max_batch_size, engine.max_length, engine.prefill_tokens

    def prefill(self, first: int, starts: Sequence[Start]) -> list[int]:
        """See ``Engine``."""
        return self._everywhere("prefill", first, starts)

    def begin(self, first: int, starts: Sequence[Start]) -> None:
        """See ``Engine``."""
        self._everywhere("begin", first, starts)

    def prefill_piece(self) -> list[int] | None:
        """See ``Engine``."""
        return self._everywhere("prefill_piece")

    def step(self) -> StepTokens:
        """See ``Engine``."""
        return self._everywhere("step")

    def release(self, slot: int) -> None:
        """See ``Engine``."""
        self._everywhere("release", slot)

    def fork(self, source: int, starts: Mapping[int, Start]) -> None:
        """See ``Engine``."""
        self._everywhere("fork", source, starts)

    def score(self, sequences: Sequence[Sequence[int]], num_scored: Sequence[int]) -> list[Score]:
        """See ``Engine``."""
        return self._everywhere("score", sequences, num_scored)

    def keep_alive(self) -> None:
        """Do nothing together, within the time that a rank waits for another."""
        self._tell(_NOTHING)

    def dismiss(self) -> None:
        """Let the others go."""
        self._tell(_LEAVE)

    def _everywhere(self, method: str, *arguments: Any) -> Any:
        self._tell(method, *arguments)
        return getattr(self._engine, method)(*arguments)

    def _tell(self, *order: Any) -> None:
        dist.broadcast_object_list([order], src=0, group=self._group)


def follow(engine: Engine, group: dist.ProcessGroup) -> None:
    """Do on this rank what the first one's ``Leader`` does, until it is dismissed."""
    while True:
        order: list[Any] = [None]
        dist.broadcast_object_list(order, src=0, group=group)
        method, *arguments = order[0]
        if method == _LEAVE:
            return
        if method != _NOTHING:
            getattr(engine, method)(*arguments)
