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
from megatron.core.transformer import MegatronModule, TransformerConfig

from megatron_hybrid.config import RunConfig
from megatron_hybrid.train.mended_optimizers import mend


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
        use_precision_aware_optimizer=_keeps_remainders(run),
    )
    optimizer = get_megatron_optimizer(config, chunks, config_overrides=get_standard_config_overrides(config))
    for part in optimizer.chained_optimizers:
        mend(part)
        if USING_PYTORCH_OPTIMIZER:
            _allocate_state(part.optimizer)
        elif _keeps_remainders(run):
            for parameter in part.get_parameters():
                part.optimizer.initialize_state(parameter, parameter.dtype == torch.bfloat16)
    return optimizer


def _keeps_remainders(run: RunConfig) -> bool:
    """Whether bf16 weights and 16 bits each stand for the fp32 masters, which saves 2 bytes a parameter and a copy of the gradients.

    Transformer Engine's AdamW does it, in megatron-core's distributed optimizer alone.
    """
    return not USING_PYTORCH_OPTIMIZER and run.train.precision == "bf16" and run.parallel.distributed_optimizer


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    """Set the rate of every parameter group for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _allocate_state(adamw: torch.optim.AdamW) -> None:
    """Choose AdamW's fused update, and give it its whole state now, so that a checkpoint looks the same before and after the first step."""
    for group in adamw.param_groups:
        group["fused"] = True
        for parameter in group["params"]:
            adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
