"""What megatron-core 0.16.1's optimizers get wrong in checkpoints, mended in subclasses.

Both faults are silent or fatal as soon as a bf16 model keeps some parameters in fp32 (ours: A_log, D, dt_bias), or where torch's AdamW
stands in for Transformer Engine's. The parameter updates themselves are right and stay untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
    optim_state_to_sharding_state,
)
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megatron_hybrid.train.remainder_optimizer import RemainderDistributedOptimizer


def mend(optimizer: MegatronOptimizer) -> None:
    """Give an optimizer that get_megatron_optimizer made the class that saves and loads it right; it names the class itself and takes no
    other."""
    if isinstance(optimizer, DistributedOptimizer):
        _mend_parameter_order(optimizer)
        if optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            optimizer.__class__ = RemainderDistributedOptimizer
        elif USING_PYTORCH_OPTIMIZER:
            optimizer.__class__ = TorchAdamWDistributedOptimizer
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        optimizer.__class__ = MixedDtypeOptimizer


def sharded_state(optimizer: MegatronOptimizer, model: ShardedStateDict, *, is_loading: bool) -> ShardedStateDict:
    """The optimizer's state in model shape, for megatron-core's distributed checkpoints.

    A distributed optimizer gathers its shards on one rank of each data-parallel group when it saves: on all of them, as is its default,
    they would take the host's memory once per rank.
    """
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": True}
    state = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    # The other ranks' None would be reported as a difference between ranks.
    return {name: value for name, value in state.items() if value is not None}


class TorchAdamWDistributedOptimizer(DistributedOptimizer):
    """The distributed optimizer over torch's AdamW, whose per-parameter ``step`` tensors are mishandled on load.

    It looks for ``step`` among the loaded moments, where its own checkpoints do not put it, and then gives one shared tensor to every
    parameter, so that each update would advance it once per parameter and the bias correction would be wrong without an error.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def _set_main_param_and_optimizer_states(self, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        current = self._get_main_param_and_optimizer_states(model_param)
        super()._set_main_param_and_optimizer_states(model_param, {"step": current["step"], **tensors})


class MixedDtypeOptimizer(Float16OptimizerWithFloat16Params):
    """The plain bf16 optimizer, which numbers its parameters as if all of them were bf16 when it saves them."""

    def sharded_state_dict(
        self, model_sharded_state_dict: ShardedStateDict, is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        state_dict = self.state_dict(is_loading=is_loading)
        model_of_main = {
            id(main): model
            for mains, models in zip(self.fp32_from_float16_groups, self.float16_groups, strict=True)
            for main, model in zip(mains, models, strict=True)
        }
        own = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        sharded = get_param_id_to_sharded_param_map(model_sharded_state_dict, [model_of_main.get(id(main), main) for main in own])
        number = {id(parameter): index for index, parameter in enumerate(own)}
        state_dict["fp32_from_fp16_params"] = [
            [make_sharded_optimizer_tensor(sharded[number[id(main)]], main, prefix="optimizer.state.fp32_param") for main in mains]
            for mains in self.fp32_from_float16_groups
        ]
        step = self._extract_common_per_param_step(state_dict["optimizer"])
        optim_state_to_sharding_state(state_dict["optimizer"], sharded, exclude_keys="step")
        if step is not None:
            state_dict["optimizer"]["state"]["common_step"] = step
        return state_dict


def _mend_parameter_order(optimizer: DistributedOptimizer) -> None:
    """Point each parameter to its own state where a group holds both bf16 and fp32 parameters.

    The optimizer numbers a group's parameters in buffer order and then puts the fp32 ones first, so it would save one parameter's moments
    under another's name.
    """
    for group, (fp32, float16) in enumerate(zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)):
        for order, parameter in enumerate([*fp32, *float16]):
            optimizer.model_param_group_index_map[parameter] = (group, order)
