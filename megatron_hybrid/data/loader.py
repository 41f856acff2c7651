"""Micro-batches for one data-parallel rank, read ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from megatron_hybrid.data.hashing import sample_hashes
from megatron_hybrid.data.stream import SampleStream

_STEPS_AHEAD = 2


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward pass on the host (pinned where asked for)."""

    indices: torch.Tensor
    """Global sample indices, int64 [B]."""
    tokens: torch.Tensor
    """int64 [B, L]."""
    labels: torch.Tensor
    """int64 [B, L]."""
    loss_mask: torch.Tensor
    """float32 [B, L]."""
    segment_ids: torch.Tensor
    """int32 [B, L]."""
    partial_hash: int
    """Sum of the samples' hashes, modulo 2^64."""


@dataclass(frozen=True)
class StepBatch:
    """What one rank computes in one optimizer step."""

    position: int
    """Global index of the step's first sample (over all ranks)."""
    micro_batches: tuple[MicroBatch, ...]

    @property
    def partial_hash(self) -> int:
        """This data-parallel rank's share of the step's batch hash, as an int64.

        Over the data-parallel group: all-reduce by sum as int64, then ``hashing.combine_hashes([sum])``. The result names the step's
        samples and tokens, whatever the layout and the micro batch size.
        """
        total = sum(micro_batch.partial_hash for micro_batch in self.micro_batches) & ((1 << 64) - 1)
        return total - (1 << 64) if total >> 63 else total


def micro_batch_indices(position: int, global_batch_size: int, micro_batch_size: int, data_rank: int, data_size: int) -> list[range]:
    """Return the global sample indices of each micro-batch of one rank in the step that begins at ``position``.

    Micro-batch ``j`` of rank ``r`` of ``d`` takes the ``m`` samples from ``position + (j d + r) m``. All ranks together take ``position``
    to ``position + global_batch_size`` (excluded), each sample once, in every layout.

    Raises:
        ValueError: the global batch does not divide by micro batch x ranks.
    """
    per_pass = micro_batch_size * data_size
    if global_batch_size % per_pass:
        raise ValueError(
            f"global_batch_size={global_batch_size} does not divide by micro_batch_size={micro_batch_size} x {data_size} data-parallel "
            "ranks; change one of them"
        )
    firsts = range(position + data_rank * micro_batch_size, position + global_batch_size, per_pass)
    return [range(first, first + micro_batch_size) for first in firsts]


class BatchLoader:
    """Iterates over the steps of a run for one data-parallel rank; a context manager that ends its threads.

    An error while reading ahead is raised at the step it belongs to.

    Args:
        position: global sample index at which to begin.
        stop: global sample index at which to end; unset: never.
        num_workers: threads that read ahead, about two steps; 0 reads when asked.
        pin_memory: put the tensors into pinned memory, for copies to a CUDA device that do not block.

    Raises:
        ValueError: the global batch does not divide by micro batch x ranks.
    """

    def __init__(
        self,
        stream: SampleStream,
        *,
        position: int,
        stop: int | None = None,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        num_workers: int,
        pin_memory: bool = False,
    ) -> None:
        micro_batch_indices(0, global_batch_size, micro_batch_size, data_rank, data_size)
        self._stream = stream
        self._submitted = position
        self._stop = stop
        self._split = (global_batch_size, micro_batch_size, data_rank, data_size)
        self._pin_memory = pin_memory
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="read-ahead") if num_workers else None
        self._ahead: deque[tuple[int, list[Future[MicroBatch]]]] = deque()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Drop what was read ahead and end the threads; a reading in progress is waited for."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        """Return the next step's micro-batches."""
        if self._threads is None:
            if self._at_end():
                raise StopIteration
            position = self._advance()
            return StepBatch(position, tuple(self._read(indices) for indices in micro_batch_indices(position, *self._split)))
        while len(self._ahead) < _STEPS_AHEAD and not self._at_end():
            position = self._advance()
            self._ahead.append(
                (position, [self._threads.submit(self._read, indices) for indices in micro_batch_indices(position, *self._split)])
            )
        if not self._ahead:
            raise StopIteration
        position, futures = self._ahead.popleft()
        return StepBatch(position, tuple(future.result() for future in futures))

    def _at_end(self) -> bool:
        return self._stop is not None and self._submitted >= self._stop

    def _advance(self) -> int:
        position = self._submitted
        self._submitted += self._split[0]
        return position

    def _read(self, indices: range) -> MicroBatch:
        samples = [self._stream[index] for index in indices]
        tokens_BL = np.stack([sample["tokens"] for sample in samples])
        index_array = np.array(indices, dtype=np.int64)
        return MicroBatch(
            indices=self._tensor(index_array),
            tokens=self._tensor(tokens_BL),
            labels=self._tensor(np.stack([sample["labels"] for sample in samples])),
            loss_mask=self._tensor(np.stack([sample["loss_mask"] for sample in samples])),
            segment_ids=self._tensor(np.stack([sample["segment_ids"] for sample in samples])),
            partial_hash=int(sample_hashes(index_array, tokens_BL).sum(dtype=np.uint64)),
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._pin_memory else tensor
