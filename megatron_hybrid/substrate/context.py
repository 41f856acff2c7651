"""What a rank knows about where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class Substrate:
    """Where this rank stands: its device, its place in the layout, and megatron-core's groups."""

    device: torch.device
    backend: Literal["gloo", "nccl"]
    rank: int
    world_size: int
    local_rank: int
    hosts: tuple[str, ...]
    """Host of every rank."""
    tensor_size: int
    tensor_rank: int
    pipeline_size: int
    pipeline_rank: int
    virtual_pipeline_size: int
    """Model chunks on this rank."""
    data_size: int
    data_rank: int
    num_threads: int
    """CPU threads of this rank."""
    groups: ProcessGroupCollection
    """All groups of megatron-core: tp, pp, dp, dp_cp, mp and so on."""
    control_group: dist.ProcessGroup
    """All ranks over gloo: for small agreements among hosts that must not wait for a GPU."""

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """Ranks that split the same layers."""
        return self.groups.tp

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """Ranks that hold the stages of one copy of the model."""
        return self.groups.pp

    @property
    def data_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same part of the model."""
        return self.groups.dp
