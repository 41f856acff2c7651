"""The scaling state of one rank's float8 linears, and its one update per optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_hybrid.fp8.linear import Float8Linear
from megatron_hybrid.fp8.scaling import new_scale, rolled, window_amax


class ScalingState:
    """Histories and scales of linears under delayed scaling, in one tensor each, so that an update costs a few operations.

    Args:
        linears: at least one, all of one recipe and on one device. Their buffers become views of these tensors.
    """

    def __init__(self, linears: Sequence[Float8Linear]) -> None:
        self.delayed = linears[0].recipe.delayed
        self.amax_history_NRH = torch.stack([linear.amax_history_RH for linear in linears])
        self.scale_NR = torch.stack([linear.scale_R for linear in linears])
        self.inverse_scale_NRA = torch.stack([linear.inverse_scale_RA for linear in linears])
        self.largest_R = self.scale_NR.new_tensor([each.largest for each in linears[0].formats])
        for index, linear in enumerate(linears):
            linear.amax_history_RH, linear.scale_R = self.amax_history_NRH[index], self.scale_NR[index]
            linear.inverse_scale_RA = self.inverse_scale_NRA[index]

    def finish_step(self, group: dist.ProcessGroup) -> None:
        """Agree on the step's amaxes among the ranks of ``group``, make the next step's scales, and roll the window; collective.

        To be called once per optimizer step, after its last backward pass.
        """
        staged_NR = self.amax_history_NRH[..., 0].contiguous()
        dist.all_reduce(staged_NR, dist.ReduceOp.MAX, group=group)
        self.amax_history_NRH[..., 0] = staged_NR
        self.advance()

    def advance(self) -> None:
        """Make the next step's scales of the window, and roll it."""
        amax_NR = window_amax(self.amax_history_NRH, self.delayed.amax_algorithm)
        self.scale_NR.copy_(new_scale(amax_NR, self.scale_NR, self.largest_R, self.delayed.margin))
        self.inverse_scale_NRA[..., 0] = self.scale_NR.reciprocal()
        self.amax_history_NRH.copy_(rolled(self.amax_history_NRH))
