"""Micro-batches of images for one data-parallel rank, decoded ahead by worker processes.

The position in the data is one number, the global index of the next sample. What a sample shows depends on that index and the
configuration alone, so a run resumes at the index, under any number of ranks, any micro-batch size and any number of workers.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vision_agglom.config.images import ImagesConfig
from vision_agglom.contract import ImageBatch
from vision_agglom.images.samples import Request, SampleReader

_log = logging.getLogger(__name__)

Resolution = int | Callable[[int], int]
"""A side in pixels; or a function from the global index of a round's first sample, the same on every rank, to one."""


class ImageStream:
    """Endless iterator over one rank's micro-batches; a context manager that ends its workers.

    Round ``j`` takes the ``data_size x micro_batch`` samples from ``first_sample`` on after those of the rounds before; rank ``r`` takes
    the ``micro_batch`` samples from ``r x micro_batch`` on within it. A damaged image is counted in ``damaged``, logged with its name, and
    another of its source stands in, the same on every host (``Mixture.candidates``).

    Args:
        config: sources and how they are framed.
        resolution: side of the squares in pixels, or a function that gives each round's.
        data_rank: this data-parallel rank.
        data_size: data-parallel ranks.
        micro_batch: samples per micro-batch of one rank.
        first_sample: global index at which to begin: 0, or a checkpoint's position.
        device: where the batches go; pixels travel as bytes and become float32 there.

    Raises:
        ValueError: a source is missing, empty or damaged; or the numbers make no sense. While iterating: too many damaged images.
    """

    def __init__(
        self,
        config: ImagesConfig,
        *,
        resolution: Resolution,
        data_rank: int = 0,
        data_size: int = 1,
        micro_batch: int,
        first_sample: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not (0 <= data_rank < data_size and micro_batch > 0 and first_sample >= 0):
            raise ValueError(
                f"data_rank={data_rank}, data_size={data_size}, micro_batch={micro_batch}, first_sample={first_sample}: expected "
                "0 <= data_rank < data_size, micro_batch > 0 and first_sample >= 0"
            )
        self.position = first_sample
        """Global index of the first sample that no rank was given yet."""
        self.damaged: dict[str, int] = {}
        """"name: what is wrong" of each damaged image that this rank met -> how often."""
        self._per_round = data_size * micro_batch
        self._device = torch.device(device)
        self._reader = SampleReader(config)
        self._loader = DataLoader(
            self._reader,
            batch_size=None,
            sampler=_requests(first_sample, data_rank, micro_batch, self._per_round, resolution),
            num_workers=config.num_workers,
            prefetch_factor=config.batches_ahead if config.num_workers else None,
            collate_fn=_as_it_is,
            pin_memory=self._device.type == "cuda",
            # Its own, so that beginning to read leaves the global one alone; nothing is drawn from it.
            generator=torch.Generator(),
            multiprocessing_context=_worker_context() if config.num_workers else None,
        )
        self._batches: Iterator[tuple[Tensor, Tensor, int, list[str]]] | None = None

    def __enter__(self) -> ImageStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[ImageBatch]:
        return self

    def __next__(self) -> ImageBatch:
        """Return the next micro-batch."""
        if self._batches is None:
            with _starting_processes():
                self._batches = iter(self._loader)
        pixels_BCHW, indices_B, resolution, damaged = next(self._batches)
        self.position += self._per_round
        for problem in damaged:
            self.damaged[problem] = self.damaged.get(problem, 0) + 1
            if self.damaged[problem] == 1:
                _log.warning("damaged image passed over: %s", problem)
        images_BCHW = pixels_BCHW.to(self._device, non_blocking=True).float().div_(255.0)
        return ImageBatch(images_BCHW, indices_B, resolution)

    def close(self) -> None:
        """Drop what was read ahead, end the workers, and say how much damage there was."""
        self._batches = None
        if self.damaged:
            _log.warning("%d damaged images were passed over, %d times in all", len(self.damaged), sum(self.damaged.values()))

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides the samples, as JSON data for a checkpoint (``data.stream.require_same_data`` compares)."""
        config = self._reader.config
        framing = {name: getattr(config, name) for name in ("aspect", "crop_scale", "crop_ratio", "flip_probability")}
        return self._reader.mixture.fingerprint() | {
            name: list(value) if isinstance(value, tuple) else value for name, value in framing.items()
        }


def _requests(round_start: int, data_rank: int, micro_batch: int, per_round: int, resolution: Resolution) -> Iterator[Request]:
    while True:
        first = round_start + data_rank * micro_batch
        yield Request(range(first, first + micro_batch), resolution(round_start) if callable(resolution) else resolution)
        round_start += per_round


def _worker_context() -> BaseContext:
    """Workers come from a server that has imported what they need and nothing else: forking the training process would copy the locks of
    its threads and its CUDA context.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([SampleReader.__module__])
    return context


@contextmanager
def _starting_processes() -> Iterator[None]:
    """What starts meanwhile never hears of Ctrl-C, which a terminal sends to all processes: this one ends them, without tracebacks."""
    # multiprocessing's helper takes the block off again when it starts.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _as_it_is(answer: Any) -> Any:
    return answer
