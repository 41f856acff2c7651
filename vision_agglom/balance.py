"""How the losses of several teachers are weighed against each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


class AdaLoss:
    """Every term divided by its own running mean (Hu et al. 2019): terms of any scale pull alike.

    The means move once per step, from the whole step's images on all ranks; until a term was seen its factor is 1.
    """

    def __init__(self, terms: Sequence[str], momentum: float, device: torch.device) -> None:
        self.index = {term: number for number, term in enumerate(terms)}
        self.momentum = momentum
        # Running sum of means and of their weights: their quotient has no bias towards the first steps.
        self.means_2T = torch.zeros(2, len(terms), dtype=torch.float64, device=device)
        self._pending_2T = torch.zeros_like(self.means_2T)

    def factor(self, term: str) -> Tensor:
        """What multiplies the term in this step, fp32."""
        mean, weight = self.means_2T[:, self.index[term]]
        return torch.where(weight > 0, weight / mean.clamp(min=1e-12), torch.ones_like(mean)).float()

    def observe(self, term: str, loss_B: Tensor) -> None:
        """Count the term's loss of these images."""
        self._pending_2T[:, self.index[term]] += torch.stack(
            [loss_B.detach().double().sum(), loss_B.new_full((), len(loss_B), dtype=torch.float64)]
        )

    def finish_step(self, group: ProcessGroup) -> None:
        """Move the means of the terms seen in this step. Collective over the data ranks."""
        distributed.all_reduce(self._pending_2T, group=group)
        sums_T, counts_T = self._pending_2T
        seen_T = counts_T > 0
        step_2T = torch.stack([sums_T / counts_T.clamp(min=1), torch.ones_like(counts_T)])
        self.means_2T.copy_(torch.where(seen_T, self.momentum * self.means_2T + (1 - self.momentum) * step_2T, self.means_2T))
        self._pending_2T.zero_()


def uncertainty_weighted(loss_B: Tensor, log_variance: Tensor) -> Tensor:
    """loss / (2 s^2) + log s, with log s^2 learned (Kendall, Gal and Cipolla 2018)."""
    return 0.5 * (torch.exp(-log_variance) * loss_B + log_variance)
