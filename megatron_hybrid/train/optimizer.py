"""AdamW through megatron-core: plain or distributed, with fp32 masters under bf16."""

from __future__ import annotations

import math

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    USING_PYTORCH_OPTIMIZER,
    MegatronOptimizer,
    OptimizerConfig as CoreOptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer import MegatronModule, TransformerConfig

from megatron_hybrid.config import RunConfig


def wrap_data_parallel(chunks: list[MegatronModule], run: RunConfig, config: TransformerConfig) -> list[DistributedDataParallel]:
    """Wrap each model chunk so that gradients are summed in fp32 over the data-parallel ranks.

    They are summed, not averaged: the loss is a sum over tokens, and the schedule divides by the step's token count at the end.
    """
    parallel = run.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
        check_for_nan_in_grad=True,
    )
    # Only the first chunk's buckets overlap well with backward: later chunks finish first (megatron-core's own rule).
    return [
        DistributedDataParallel(config=config, ddp_config=ddp_config, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(chunks: list[DistributedDataParallel], run: RunConfig) -> MegatronOptimizer:
    """Make the optimizer of the wrapped model chunks.

    Decay follows Megatron: one-dimensional parameters (norms, biases, A_log, D, dt_bias) are exempt.
    """
    options, bf16 = run.optimizer, run.train.precision == "bf16"
    config = CoreOptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        adam_eps=options.eps,
        # An infinite bound clips nothing but still has the norm computed, which the log wants.
        clip_grad=options.clip_grad or math.inf,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=run.parallel.distributed_optimizer,
        overlap_param_gather=run.parallel.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, chunks, config_overrides=get_standard_config_overrides(config))
    if USING_PYTORCH_OPTIMIZER:
        for part in optimizer.chained_optimizers:
            _adapt_to_torch_adamw(part)
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    """Set the rate of every parameter group for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class TorchAdamWDistributedOptimizer(DistributedOptimizer):
    """megatron-core's distributed optimizer over torch's AdamW, whose per-parameter ``step`` tensors 0.16.1 mishandles on load.

    It looks for ``step`` among the loaded moments, where its own checkpoints do not put it, and then gives one shared tensor to every parameter, so that each update would advance it
    once per parameter and the bias correction would be wrong without an error.
    """

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def _set_main_param_and_optimizer_states(self, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        current = self._get_main_param_and_optimizer_states(model_param)
        super()._set_main_param_and_optimizer_states(model_param, {"step": current["step"], **tensors})


def _adapt_to_torch_adamw(part: MegatronOptimizer) -> None:
    """Give the optimizer its whole state now, and the fused update.

    With the state there from the start, a checkpoint looks the same before and after the first step, and loading needs no special case.
    """
    if isinstance(part, DistributedOptimizer):
        # get_megatron_optimizer names the class itself and takes no other.
        part.__class__ = TorchAdamWDistributedOptimizer
    for group in part.optimizer.param_groups:
        group["fused"] = True
        for parameter in group["params"]:
            part.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
