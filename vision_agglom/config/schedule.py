"""When what is trained: stages, and in each of them partitions with a batch, resolutions and teachers of their own."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from megatron_hybrid.config.section import Section


class PartitionConfig(Section):
    """A part of each step: so many images at one resolution, shown to some or all teachers."""

    resolutions: tuple[int, ...] = Field(min_length=1)
    """Sides in pixels; each step draws one (stochastic resolution), the same on all ranks."""
    batch_size: int = Field(gt=0)
    """Images per step over all ranks."""
    micro_batch_size: int = Field(1, gt=0)
    """Images per forward pass of one rank."""
    rate: float = Field(1.0, gt=0, le=1)
    """Share of the steps that this partition takes part in, evenly spread."""
    weight: float = Field(1.0, gt=0)
    """Factor of its images' losses. At 1 every image of a step counts alike, so a partition weighs as much as its batch."""
    teachers: tuple[str, ...] | None = None
    """Teachers that are matched here. Unset: all."""

    def turns(self, steps: int) -> int:
        """How many of a stage's first ``steps`` steps the partition takes part in."""
        return math.floor(steps * self.rate + 1e-9)

    @model_validator(mode="after")
    def _check(self) -> PartitionConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size={self.batch_size} does not divide by micro_batch_size={self.micro_batch_size}; change one")
        if self.teachers == ():
            raise ValueError("teachers is empty; leave it out for all of them")
        return self


class StageConfig(Section):
    """A stretch of the run. The learning rate, and the teachers' statistics, begin anew with each stage."""

    steps: int = Field(gt=0)
    """Optimizer steps."""
    partitions: tuple[PartitionConfig, ...] = Field(min_length=1)
    """What each step is made of."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate. Unset: optimizer.lr."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    decay: Literal["cosine", "constant"] = "cosine"
    """cosine: down to optimizer.min_lr at the stage's end."""

    def samples_before(self, steps: int) -> int:
        """Images that the stage's first ``steps`` steps take."""
        return sum(partition.turns(steps) * partition.batch_size for partition in self.partitions)

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} is longer than the stage of {self.steps} steps; shorten it")
        if all(partition.rate < 1 for partition in self.partitions):
            raise ValueError("every partition has a rate below 1, so some steps would have no images; set one rate to 1")
        return self
