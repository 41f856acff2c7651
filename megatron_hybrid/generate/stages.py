"""What passes between the pipeline's stages while they generate: the residual stream forward, chosen tokens from the last to all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.substrate.context import Substrate


@dataclass(frozen=True)
class Stages:
    """This rank's place among the pipeline's ranks; with one stage there is nobody to talk to."""

    rank: int = 0
    num_stages: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, substrate: Substrate) -> Stages:
        """The stages that this rank belongs to."""
        return cls(substrate.pipeline_rank, substrate.pipeline_size, substrate.pipeline_group)

    @property
    def is_first(self) -> bool:
        """Whether this stage has the embedding."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage has the output layer."""
        return self.rank == self.num_stages - 1

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The stage before's residual stream."""
        hidden = torch.empty(shape, dtype=dtype, device=device)
        dist.recv(hidden, dist.get_global_rank(self.group, self.rank - 1), group=self.group)
        return hidden

    def send(self, hidden: Tensor) -> None:
        """Hand the residual stream on, unless this is the last stage."""
        if not self.is_last:
            dist.send(hidden.contiguous(), dist.get_global_rank(self.group, self.rank + 1), group=self.group)

    def share(self, tensor: Tensor) -> Tensor:
        """Fill a tensor with the last stage's on all of them, and return it."""
        if self.num_stages > 1:
            dist.broadcast(tensor, dist.get_global_rank(self.group, self.num_stages - 1), group=self.group)
        return tensor
