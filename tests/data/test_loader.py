"""Batches: the same samples in every layout, errors that surface, threads that end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hybrid.data.blend import Blend, BlendPhase
from megatron_hybrid.data.hashing import combine_hashes
from megatron_hybrid.data.indexed import IndexedCorpus
from megatron_hybrid.data.loader import BatchLoader, StepBatch, micro_batch_indices
from megatron_hybrid.data.source import SampleSource
from megatron_hybrid.data.stream import Sample, SampleStream

LENGTH = 16


@pytest.fixture
def stream(tmp_path: Path, write_corpus: Callable[..., Path]) -> SampleStream:
    corpora = {
        name: IndexedCorpus(write_corpus(tmp_path / name, np.random.default_rng(seed).integers(0, 1000, (20, 37)).tolist()))
        for seed, name in enumerate("ab")
    }
    sources = [SampleSource(name, corpus, LENGTH, seed=0) for name, corpus in corpora.items()]
    return SampleStream(sources, Blend([BlendPhase(0, (0.7, 0.3))], 0), LENGTH, 0, reset_at_documents=True)


def run_steps(
    stream: SampleStream, num_steps: int, global_batch: int, micro_batch: int, data_size: int, position: int = 0, num_workers: int = 2
) -> list[list[StepBatch]]:
    """Steps by data-parallel rank."""
    ranks = []
    for rank in range(data_size):
        with BatchLoader(
            stream,
            position=position,
            stop=position + num_steps * global_batch,
            global_batch_size=global_batch,
            micro_batch_size=micro_batch,
            data_rank=rank,
            data_size=data_size,
            num_workers=num_workers,
        ) as loader:
            ranks.append(list(loader))
    return ranks


def step_hashes(ranks: list[list[StepBatch]]) -> list[int]:
    """Batch hashes as the ranks log them: an int64 all-reduce, which wraps, and the combine rule."""
    totals = torch.tensor([[step.partial_hash for step in steps] for steps in ranks]).sum(dim=0)
    return [combine_hashes([int(total)]) for total in totals]


@pytest.mark.parametrize(("micro_batch", "data_size"), [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (3, 4), (12, 1), (4, 3)])
def test_every_layout_reads_the_same_step(stream: SampleStream, micro_batch: int, data_size: int) -> None:
    reference = run_steps(stream, 3, 12, 1, 1, position=5)
    ranks = run_steps(stream, 3, 12, micro_batch, data_size, position=5)
    for step in range(3):
        samples = {}
        for steps in ranks:
            assert steps[step].position == 5 + 12 * step
            for batch in steps[step].micro_batches:
                assert batch.tokens.shape == (micro_batch, LENGTH)
                samples.update(zip(batch.indices.tolist(), batch.tokens.tolist(), strict=True))
        assert sorted(samples) == list(range(5 + 12 * step, 17 + 12 * step))
        assert all(row == stream[index]["tokens"].tolist() for index, row in samples.items())
    assert step_hashes(ranks) == step_hashes(reference)
    assert len(set(step_hashes(ranks))) == 3


def test_resume_under_another_batch_size_goes_on_with_the_next_sample(stream: SampleStream) -> None:
    seen = [batch.indices.tolist() for step in run_steps(stream, 2, 12, 1, 1)[0] for batch in step.micro_batches]
    seen += [
        batch.indices.tolist()
        for steps in zip(*run_steps(stream, 2, 8, 2, 2, position=24), strict=True)
        for step in steps
        for batch in step.micro_batches
    ]
    assert sorted(index for indices in seen for index in indices) == list(range(40))


def test_micro_batches_hold_whole_samples(stream: SampleStream) -> None:
    (step,) = run_steps(stream, 1, 2, 2, 1)[0]
    (batch,) = step.micro_batches
    for key in ("tokens", "labels", "loss_mask", "segment_ids"):
        assert (getattr(batch, key).numpy() == np.stack([stream[0][key], stream[1][key]])).all()  # type: ignore[literal-required]
    assert (batch.loss_mask.dtype, batch.segment_ids.dtype) == (torch.float32, torch.int32)


def test_read_ahead_changes_nothing(stream: SampleStream) -> None:
    assert step_hashes(run_steps(stream, 5, 4, 2, 1, num_workers=0)) == step_hashes(run_steps(stream, 5, 4, 2, 1, num_workers=4))


def test_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="global_batch_size=10 does not divide by micro_batch_size=2 x 2 data-parallel ranks"):
        micro_batch_indices(0, 10, 2, 0, 2)


class _FailingStream:
    """Fails at one index."""

    def __init__(self, stream: SampleStream, bad: int) -> None:
        self._stream, self._bad = stream, bad

    def __getitem__(self, index: int) -> Sample:
        if index == self._bad:
            raise OSError("the disk went away")
        return self._stream[index]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_errors_surface_at_their_step(stream: SampleStream, num_workers: int) -> None:
    with BatchLoader(
        _FailingStream(stream, 9), position=0, global_batch_size=4, micro_batch_size=1, data_rank=0, data_size=1, num_workers=num_workers
    ) as loader:
        assert [next(loader).position, next(loader).position] == [0, 4]
        with pytest.raises(OSError, match="the disk went away"):
            next(loader)


def test_threads_end_with_the_loader(stream: SampleStream) -> None:
    before = threading.active_count()
    loader = BatchLoader(stream, position=0, global_batch_size=4, micro_batch_size=1, data_rank=0, data_size=1, num_workers=3)
    next(loader)
    assert threading.active_count() > before
    start = time.monotonic()
    loader.close()
    assert threading.active_count() == before and time.monotonic() - start < 5


def test_closing_waits_for_no_more_than_the_reading_in_progress(stream: SampleStream) -> None:
    slow = _SlowStream(stream)
    loader = BatchLoader(slow, position=0, global_batch_size=32, micro_batch_size=1, data_rank=0, data_size=1, num_workers=4)
    next(loader)
    num_begun = len(slow.begun)
    loader.close()
    # Each of the four threads may have taken one more between the two lines.
    assert len(slow.begun) <= num_begun + 4, "32 samples wait in the queue"


class _SlowStream:
    """Takes its time over every sample, and notes which it was asked for."""

    def __init__(self, stream: SampleStream) -> None:
        self._stream, self.begun = stream, list[int]()

    def __getitem__(self, index: int) -> Sample:
        self.begun.append(index)
        time.sleep(0.2)
        return self._stream[index]
