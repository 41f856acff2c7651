"""Decode steps as CUDA graphs: one for each batch size and way of choosing tokens, captured when first needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from megatron_hybrid.generate.sampling import Needs

if TYPE_CHECKING:
    from megatron_hybrid.generate.engine import Slots


class Graphs:
    """Captured steps over buffers that stay where they are.

    Args:
        run_step: runs a step of the first slots, given their number and what choosing their tokens needs, without waiting for the device.
        max_batch_size: slots that there are.
    """

    def __init__(self, run_step: Callable[[int, Needs], None], max_batch_size: int) -> None:
        self._run_step = run_step
        self._sizes = batch_sizes(max_batch_size)
        self._graphs: dict[tuple[int, Needs], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, size: int, needs: Needs, slots: Slots) -> None:
        """Run a step of at least the first ``size`` slots; those that are not active are left alone."""
        size = next(each for each in self._sizes if each >= size)
        if (size, needs) not in self._graphs:
            self._graphs[size, needs] = self._capture(size, needs, slots)
        self._graphs[size, needs].replay()

    def _capture(self, size: int, needs: Needs, slots: Slots) -> torch.cuda.CUDAGraph:
        changing = (slots.token_B, slots.num_tokens_B, slots.is_active_B, slots.sampling.has_seen_BV)
        before = [tensor.clone() for tensor in changing]
        # Kernels are compiled and libraries set up at their first call, which a capture would not survive. Nobody is active meanwhile, so
        # the caches stay as they are; what a step changes of its own accord is put back.
        slots.is_active_B.fill_(False)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run_step(size, needs)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(changing, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        # Other threads (a watchdog, a web server) may call into CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._run_step(size, needs)
        return graph


def batch_sizes(max_batch_size: int) -> list[int]:
    """Sizes that graphs are made for: 1, 2, 3, 4, 6, 8, 12, 16... and the largest, so that at most a third of a step's rows are idle.

    >>> batch_sizes(20)
    [1, 2, 3, 4, 6, 8, 12, 16, 20]
    """
    sizes, size = {1, max_batch_size}, 2
    while size < max_batch_size:
        sizes |= {each for each in (size, size * 3 // 2) if each < max_batch_size}
        size *= 2
    return sorted(sizes)
