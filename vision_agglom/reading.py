"""What a rank reads: micro-batches of images for every step, for the look ahead of a stage's beginning, and for validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megatron_hybrid.data.hashing import sample_hashes
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.train.task import StepData
from vision_agglom.config.images import ImagesConfig
from vision_agglom.config.schema import VisionConfig
from vision_agglom.contract import ImageBatch
from vision_agglom.geometry import canvas_side, draw_view
from vision_agglom.images.stream import ImageStream
from vision_agglom.partition import PartPlan, RunPlan, StepPlan
from vision_agglom.tokens import View

OpenStream = Callable[..., ImageStream]


@dataclass(frozen=True)
class VisionMicroBatch:
    """Images of one forward pass, and what the step has in mind for them."""

    batch: ImageBatch
    part: PartPlan
    step: int
    is_training: bool
    observes: bool
    """Whether the teachers' features count towards the statistics."""

    @cached_property
    def samples(self) -> np.ndarray:
        """Global sample indices."""
        return self.batch.sample_indices_B.numpy()

    def view(self, name: str, grid: tuple[int, int], seed: int) -> View:
        """The window that the student or a teacher of that name and grid is shown."""
        return draw_view(grid, self.part.resolution, self.batch.resolution, self.samples, seed=seed, step=self.step, name=name)


class StepReader:
    """Reads a run's images on one rank.

    Args:
        run: the run.
        plan: its steps.
        substrate: where this rank stands.
        open_stream: opens a stream of images; takes ``ImageStream``'s arguments.
    """

    def __init__(self, run: VisionConfig, plan: RunPlan, substrate: Substrate, open_stream: OpenStream) -> None:
        self.run, self.plan, self.substrate, self.open_stream = run, plan, substrate, open_stream

    def fingerprint(self) -> dict[str, Any]:
        """What decides the samples."""
        return self._open(self.run.images, self.plan.streams(0)[0], 0).fingerprint()

    def training_steps(self, step: int, begin_stage: Callable[[int, int], None]) -> Iterator[StepData]:
        """Steps from number ``step`` on; ``begin_stage(stage, step)`` is called before a stage's first step is read."""
        stage = None
        with ExitStack() as open_streams:
            streams: dict[int, ImageStream] = {}
            while step < self.run.total_steps:
                step_plan = self.plan.plan(step)
                if step_plan.stage != stage:
                    open_streams.close()
                    stage = step_plan.stage
                    if step_plan.stage_step == 0:
                        begin_stage(stage, step)
                    streams = {
                        stream: open_streams.enter_context(closing(self._open(self.run.images, stream, step)))
                        for stream in self.plan.streams(stage)
                    }
                yield self._read_step(step_plan, streams)
                step += 1

    def first_micro_batches(self, stage: int, step: int) -> Iterator[VisionMicroBatch]:
        """The first batch of each of a stage's partitions, to be observed; ``step`` is the stage's first."""
        for stream in self.plan.streams(stage):
            part = self.plan.part_at(stream, self.plan.first_sample(stream, step))
            with closing(self._open(self.run.images, stream, step)) as source:
                for batch in self._read_part(part, source):
                    yield VisionMicroBatch(batch, part, step, is_training=True, observes=True)

    def validation_steps(self, images: ImagesConfig) -> Iterator[StepData]:
        """A validation source from its beginning, framed and batched as the last stage's first partition."""
        stream = self.plan.streams(len(self.run.stages) - 1)[0]
        step = self.run.total_steps - self.run.stages[-1].steps
        part = self.plan.part_at(stream, self.plan.first_sample(stream, step))
        with closing(self._open(images, stream, step)) as source:
            for _ in range(self.run.validation.num_batches):
                micro_batches = []
                for batch in self._read_part(part, source):
                    now = self.plan.part_at(stream, int(batch.sample_indices_B[0]))
                    micro_batches.append(VisionMicroBatch(batch, now, 0, is_training=False, observes=False))
                yield StepData(micro_batches, part.partition.batch_size, _hash(micro_batches))

    def _open(self, images: ImagesConfig, stream: int, step: int) -> ImageStream:
        """A partition's images from a step of its stage on."""
        student, shift = self.run.student, self.run.loss.shift_patches
        return self.open_stream(
            images,
            resolution=lambda sample: canvas_side(self.plan.part_at(stream, sample).resolution, student.patch_size, shift),
            data_rank=self.substrate.data_rank,
            data_size=self.substrate.data_size,
            micro_batch=self.plan.part_at(stream, self.plan.first_sample(stream, step)).partition.micro_batch_size,
            first_sample=self.plan.first_sample(stream, step),
            device=self.substrate.device,
        )

    def _read_step(self, step_plan: StepPlan, streams: dict[int, ImageStream]) -> StepData:
        micro_batches = [
            VisionMicroBatch(batch, part, step_plan.step, is_training=True, observes=step_plan.stage_step > 0)
            for part in step_plan.parts
            for batch in self._read_part(part, streams[part.stream])
        ]
        return StepData(micro_batches, step_plan.num_samples, _hash(micro_batches))

    def _read_part(self, part: PartPlan, stream: ImageStream) -> list[ImageBatch]:
        partition = part.partition
        count = partition.batch_size // (partition.micro_batch_size * self.substrate.data_size)
        return [next(stream) for _ in range(count)]


def _hash(micro_batches: list[VisionMicroBatch]) -> int:
    """This rank's share of a step's hash: of the samples and of the resolution of each."""
    total = 0
    for micro in micro_batches:
        resolutions = np.full((len(micro.samples), 1), micro.batch.resolution)
        total += int(sample_hashes(micro.samples, resolutions).sum(dtype=np.uint64))
    # As an int64, which all ranks' shares are summed in.
    total &= (1 << 64) - 1
    return total - (1 << 64) if total >= 1 << 63 else total
