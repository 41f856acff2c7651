"""What each step of a run is made of, from its configuration alone; and which rank runs which teacher."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from vision_agglom.config.schedule import PartitionConfig
from vision_agglom.config.schema import VisionConfig
from vision_agglom.randomness import choose

_STREAM_BITS = 40
"""Sample indices of one partition's stream lie below 2^40; the number of the stream stands above them."""


@dataclass(frozen=True)
class PartPlan:
    """One partition's share of one step."""

    partition: PartitionConfig
    stream: int
    """Number of the partition among all partitions of all stages: each has a stream of samples of its own."""
    resolution: int
    window: int | None
    """Side of the student's windows in patches; None for global attention."""


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step."""

    step: int
    """Steps of the run before it."""
    stage: int
    stage_step: int
    """Steps of its stage before it."""
    parts: tuple[PartPlan, ...]

    @property
    def num_samples(self) -> int:
        """Images over all ranks."""
        return sum(part.partition.batch_size for part in self.parts)


class RunPlan:
    """All steps of a run, addressed by their number or by the samples before them; nothing is stored per step."""

    def __init__(self, run: VisionConfig) -> None:
        self.run = run
        self._first_streams = [0, *accumulate(len(stage.partitions) for stage in run.stages)]

    def plan(self, step: int) -> StepPlan:
        """Step number ``step``, from 0."""
        index = self._stage_of(step)
        stage, stage_step = self.run.stages[index], step - self.run.first_steps[index]
        parts = tuple(
            self._part(partition, self._first_streams[index] + number, partition.turns(stage_step))
            for number, partition in enumerate(stage.partitions)
            if partition.turns(stage_step + 1) > partition.turns(stage_step)
        )
        return StepPlan(step, index, stage_step, parts)

    def first_sample(self, stream: int, step: int) -> int:
        """Sample index at which a partition's stream stands before ``step``, a step of the partition's own stage."""
        index = bisect_right(self._first_streams, stream) - 1
        partition = self._partition(stream)
        turns = partition.turns(step - self.run.first_steps[index])
        return (stream << _STREAM_BITS) + turns * partition.batch_size

    def learning_rate(self, samples_after: int) -> float:
        """Rate of the step that ends after so many images: warm-up from lr / warmup_steps, then the stage's decay."""
        step = self.run.step_at(samples_after) - 1
        index = self._stage_of(step)
        stage, done = self.run.stages[index], step - self.run.first_steps[index] + 1
        peak, lowest = stage.lr or self.run.optimizer.lr, self.run.optimizer.min_lr
        if done < stage.warmup_steps:
            return peak * done / stage.warmup_steps
        if stage.decay == "constant":
            return peak
        progress = (done - stage.warmup_steps) / max(stage.steps - stage.warmup_steps, 1)
        return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * progress))

    def _stage_of(self, step: int) -> int:
        return min(bisect_right(self.run.first_steps, step) - 1, len(self.run.stages) - 1)

    def part_at(self, stream: int, sample: int) -> PartPlan:
        """What a partition does with the batch that a sample of its stream belongs to."""
        partition = self._partition(stream)
        return self._part(partition, stream, (sample - (stream << _STREAM_BITS)) // partition.batch_size)

    def streams(self, stage: int) -> range:
        """Numbers of a stage's streams."""
        return range(self._first_streams[stage], self._first_streams[stage + 1])

    def _partition(self, stream: int) -> PartitionConfig:
        index = bisect_right(self._first_streams, stream) - 1
        return self.run.stages[index].partitions[stream - self._first_streams[index]]

    def _part(self, partition: PartitionConfig, stream: int, turn: int) -> PartPlan:
        resolution = choose(partition.resolutions, self.run.seed, f"resolution of stream {stream}", turn)
        side = resolution // self.run.student.patch_size
        sizes = tuple(size for size in self.run.student.windows.sizes if side % size == 0)
        window = choose(sizes, self.run.seed, f"window of stream {stream}", turn) if sizes else None
        return PartPlan(partition, stream, resolution, window)


@dataclass(frozen=True)
class Duty:
    """A teacher that a rank runs, on the images from share ``part`` of ``parts`` equal ones."""

    teacher: str
    part: int
    parts: int

    def images(self, num_images: int) -> range:
        """The images of this duty, of the group's images in order."""
        return range(num_images * self.part // self.parts, num_images * (self.part + 1) // self.parts)


def plan_teacher_ranks(costs: Mapping[str, float], num_ranks: int) -> list[tuple[Duty, ...]]:
    """Divide ranks among teachers by the teachers' cost per image.

    With at least as many ranks as teachers every teacher gets a group of ranks, and each further rank goes to the teacher whose ranks have
    most to do, which minimises the longest time (each group's time, cost / ranks, falls with every rank it gets). With fewer ranks each
    runs whole teachers, the most expensive ones placed first, each on the rank with least to do.

    Args:
        costs: teacher -> cost of one image, all positive.
        num_ranks: ranks that share the work.

    Returns:
        Each rank's duties.
    """
    by_cost = sorted(costs, key=lambda name: (-costs[name], name))
    if num_ranks < len(costs):
        loads = [(0.0, rank) for rank in range(num_ranks)]
        duties: list[list[Duty]] = [[] for _ in range(num_ranks)]
        for name in by_cost:
            load, rank = heapq.heappop(loads)
            duties[rank].append(Duty(name, 0, 1))
            heapq.heappush(loads, (load + costs[name], rank))
        return [tuple(of_rank) for of_rank in duties]
    sizes = dict.fromkeys(by_cost, 1)
    for _ in range(num_ranks - len(costs)):
        slowest = max(by_cost, key=lambda name: costs[name] / sizes[name])
        sizes[slowest] += 1
    return [(Duty(name, part, sizes[name]),) for name in by_cost for part in range(sizes[name])]
