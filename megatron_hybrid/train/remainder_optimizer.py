"""megatron-core's distributed optimizer without fp32 masters: a bf16 weight and a remainder of 16 bits stand for each."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


class RemainderDistributedOptimizer(DistributedOptimizer):
    """The distributed optimizer over ``adamw.RemainderAdamW``, which keeps of each bf16 weight's fp32 master only the half that the weight
    itself lacks.

    Checkpoints hold whole masters, so that every host and optimizer reads them. Steps are counted in the parameter groups, whatever other
    AdamW the host has.
    """

    def state_dict(self) -> dict[str, Any]:
        """The options of the groups; what belongs to a parameter is saved apart."""
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups]
        return {"optimizer": {"param_groups": groups}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            # Where there is no other AdamW than torch's, every parameter is given what torch's counts by.
            state.pop("step", None)

    def _get_main_param_and_optimizer_states(self, model_param: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        shard, state = self._shard_of(model_param)
        master = join_master(shard.data, state["remainder"]) if "remainder" in state else shard.data
        return {"param": master, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}

    def _set_main_param_and_optimizer_states(self, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        shard, state = self._shard_of(model_param)
        if "remainder" in state:
            weight, remainder = split_master(tensors["param"])
            shard.data.copy_(weight)
            state["remainder"].copy_(remainder)
        else:
            shard.data.copy_(tensors["param"])
        for name in ("exp_avg", "exp_avg_sq"):
            state[name].copy_(tensors[name])

    def _copy_model_params_to_main_params(self, state_dict: dict[str, Any] | None = None) -> None:
        """The weights were written from outside: they are their own masters now."""
        assert state_dict is None, "masters are loaded with the optimizer's own state"
        for state in self.optimizer.state.values():
            if "remainder" in state:
                state["remainder"].zero_()

    def _shard_of(self, model_param: torch.nn.Parameter) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        group, order = self.model_param_group_index_map[model_param]
        shard = self.optimizer.param_groups[group]["params"][order]
        return shard, self.optimizer.state[shard]


def join_master(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The fp32 number that a bf16 weight and its int16 remainder stand for.

    The remainder is the master's lower half. The weight is its upper half, rounded up where the lower half's first bit is set.
    """
    upper = weight.view(torch.int16).int() - (remainder < 0).int()
    return ((upper << 16) | (remainder.int() & 0xFFFF)).view(torch.float32)


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bf16 weight and the int16 remainder of an fp32 number; ``join_master`` gives it back bit for bit."""
    bits = master.contiguous().view(torch.int32)
    remainder = bits.to(torch.int16)
    upper = (bits >> 16) + (remainder < 0).int()
    return upper.to(torch.int16).view(torch.bfloat16), remainder
