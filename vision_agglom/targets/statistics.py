"""Mean and covariance of features as they stream by: fp64, merged by Chan's formula (Chan, Golub and LeVeque 1979)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


@dataclass
class Moments:
    """Count, mean and centred second moment (the covariance times the count) of rows seen so far; fp64."""

    count: Tensor
    """[1]."""
    mean_C: Tensor
    scatter_CC: Tensor
    """Sum over rows of (y - mean)(y - mean)^T."""

    @classmethod
    def empty(cls, channels: int, device: torch.device | str = "cpu") -> Moments:
        """Nothing seen yet."""
        zeros = {"dtype": torch.float64, "device": device}
        return cls(torch.zeros(1, **zeros), torch.zeros(channels, **zeros), torch.zeros(channels, channels, **zeros))

    @classmethod
    def of(cls, rows_NC: Tensor) -> Moments:
        """Those of the rows themselves."""
        rows_NC = rows_NC.double()
        mean_C = rows_NC.mean(0)
        centred_NC = rows_NC - mean_C
        return cls(mean_C.new_full((1,), len(rows_NC)), mean_C, centred_NC.T @ centred_NC)

    def merge(self, other: Moments) -> None:
        """Add what another has seen, in place."""
        total = self.count + other.count
        if float(other.count) == 0:
            return
        difference_C = other.mean_C - self.mean_C
        self.scatter_CC += other.scatter_CC + torch.outer(difference_C, difference_C) * (self.count * other.count / total)
        self.mean_C += difference_C * (other.count / total)
        self.count.copy_(total)

    def merged_over(self, group: ProcessGroup) -> Moments:
        """Those of all ranks' rows together, the same on every rank: merged in the order of the ranks."""
        if group.size() == 1:
            return self
        whole = Moments.empty(len(self.mean_C), self.mean_C.device)
        packed = torch.cat([self.count, self.mean_C, self.scatter_CC.flatten()])
        for rank in range(group.size()):
            part = packed.clone()
            distributed.broadcast(part, group_src=rank, group=group)
            count, mean_C, scatter = part.split([1, len(self.mean_C), self.scatter_CC.numel()])
            whole.merge(Moments(count, mean_C, scatter.view_as(self.scatter_CC)))
        return whole

    @property
    def covariance_CC(self) -> Tensor:
        """Of the rows as a population."""
        return self.scatter_CC / self.count.clamp(min=1)

    def clear(self) -> None:
        """Forget everything."""
        for tensor in (self.count, self.mean_C, self.scatter_CC):
            tensor.zero_()
