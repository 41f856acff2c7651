"""What a conversion writes: a directory in the making, filled in model order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from megatron_hybrid.config import ModelConfig, ParallelConfig
from megatron_hybrid.config.schema import check_layout
from megatron_hybrid.convert.companions import Companions
from megatron_hybrid.convert.correspondence import Correspondence
from megatron_hybrid.convert.hub_config import HubStyle
from megatron_hybrid.convert.source import Source
from megatron_hybrid.layout.stages import plan_stages


@dataclass(frozen=True)
class Layout:
    """How a target is cut into files."""

    tensor: int = 1
    """Tensor ranks that a torch_dist checkpoint is cut for; any layout can read it."""
    pipeline: int = 1
    """The same for pipeline stages."""
    style: HubStyle = "transformers"
    """Names in a Hugging Face target."""
    shard_bytes: int = 5_000_000_000
    """Size of a safetensors file."""


@dataclass(frozen=True)
class Plan:
    """What will be written: decided before the first byte."""

    model: ModelConfig
    """The source's, in the target's padding of the vocabulary."""
    correspondences: tuple[Correspondence, ...]
    dtypes: tuple[torch.dtype, ...]
    """One for each correspondence."""
    companions: Companions
    layout: Layout

    @property
    def main_dtype(self) -> str:
        """torch's name of the dtype that the embedding has."""
        return str(self.dtypes[0]).removeprefix("torch.")


class Target(Protocol):
    """One kind of target."""

    def open(self, directory: Path, written: Sequence[list[dict[str, Any]]]) -> None:
        """Begin, or go on after the correspondences that an earlier process wrote, given what ``write`` returned for each."""

    def write(self, native: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Append the next correspondence; return, as plain JSON, what ``finish`` and ``open`` need to know of it."""

    def flush(self) -> list[BinaryIO]:
        """Hand everything to the kernel, and return the open files for synchronisation."""

    def close(self) -> None:
        """Close the files."""

    def finish(self, directory: Path, written: Sequence[list[dict[str, Any]]]) -> None:
        """Write what makes the files a checkpoint; may be repeated."""

    def read_back(self, directory: Path) -> Source:
        """Open what was written, as anybody would."""


def stage_numbers(plan: Plan) -> list[int]:
    """Return the pipeline stage of every correspondence.

    Raises:
        ValueError: the model cannot be cut that way.
    """
    parallel = ParallelConfig(tensor=plan.layout.tensor, pipeline=plan.layout.pipeline)
    check_layout(plan.model, parallel, plan.companions.sequence_length)
    stages = plan_stages(plan.model, parallel, plan.companions.sequence_length)
    of_layer = [number for number, (first, end) in enumerate(stages) for _ in range(first, end)]
    # Only the embedding comes before the layers.
    return [
        0 if position == 0 else of_layer[-1] if each.layer is None else of_layer[each.layer]
        for position, each in enumerate(plan.correspondences)
    ]
