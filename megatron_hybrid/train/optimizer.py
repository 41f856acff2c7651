"""AdamW through megatron-core: plain or distributed, with fp32 masters under bf16."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    USING_PYTORCH_OPTIMIZER,
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig as CoreOptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.parallel_state import (
    get_data_parallel_group,
    get_pipeline_model_parallel_group,
    get_pipeline_model_parallel_last_rank,
)
from megatron.core.transformer import MegatronModule, TransformerConfig

from megatron_hybrid.config import OptimizerConfig, RunConfig
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
    )
    keeps_remainders = bf16 and run.parallel.distributed_optimizer and has_optimizer_kernel(chunks)
    # Leaves masters to the optimizer. megatron-core derives it from an option that also wants Transformer Engine's AdamW; ours stands in.
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = keeps_remainders
    optimizer = get_megatron_optimizer(config, chunks, config_overrides=get_standard_config_overrides(config))
    for part in optimizer.chained_optimizers:
        mend(part)
        if USING_PYTORCH_OPTIMIZER and not keeps_remainders:
            _allocate_state(part.optimizer)
    if keeps_remainders:
        optimizer.__class__ = ScalingOptimizer
        optimizer.use_remainders()
    apply_options(optimizer, options)
    return optimizer


def has_optimizer_kernel(chunks: list[DistributedDataParallel]) -> bool:
    """Whether the weights are where ``adamw.RemainderAdamW`` runs, so that 16 bits beside a bf16 weight can stand for its fp32 master."""
    return next(chunks[0].parameters()).is_cuda


class ScalingOptimizer(ChainedOptimizer):
    """Divides gradients by the step's tokens and clips them within the update, instead of in two passes over all gradients."""

    num_tokens: torch.Tensor | None = None
    """Tokens that the gradients are still to be divided by, over all ranks."""

    def use_remainders(self) -> None:
        """Put ``RemainderAdamW`` in the place of the AdamW that megatron-core made, which holds no state yet."""
        from megatron_hybrid.train.adamw import RemainderAdamW

        for part in self.chained_optimizers:
            part.optimizer = RemainderAdamW(part.optimizer.param_groups)

    @torch.no_grad()
    def step(self) -> tuple[bool, float, None]:
        """Update the weights, unless the gradient is not finite; returns whether, and the norm before clipping."""
        self.prepare_grads()
        per_token = 1.0 if self.num_tokens is None else 1.0 / max(float(self.num_tokens), 1.0)
        grad_norm = float(self.get_grad_norm()) * per_token
        if not math.isfinite(grad_norm):
            return False, grad_norm, None
        factor = per_token * min(1.0, self.config.clip_grad / (grad_norm + 1.0e-6))
        for part in self.chained_optimizers:
            part.optimizer.gradient_factor = factor
        return self.step_with_ready_grads(), grad_norm, None


def gradient_finisher(optimizer: MegatronOptimizer) -> Callable[..., None]:
    """What megatron-core's schedules call once per optimizer step, after the last backward pass: reductions over the ranks, and division
    by the tokens, unless the optimizer does that itself."""
    if not isinstance(optimizer, ScalingOptimizer):
        return finalize_model_grads

    def finish(chunks: list[torch.nn.Module], num_tokens: torch.Tensor, **options: Any) -> None:
        finalize_model_grads(chunks, None, **options)
        # Only the last pipeline stage counts them. A group of one would cost NCCL's buffers and nothing else.
        pipeline, data = get_pipeline_model_parallel_group(), get_data_parallel_group(with_context_parallel=True)
        if pipeline.size() > 1:
            torch.distributed.broadcast(num_tokens, get_pipeline_model_parallel_last_rank(), group=pipeline)
        if data.size() > 1:
            torch.distributed.all_reduce(num_tokens, group=data)
        optimizer.num_tokens = num_tokens

    return finish


def apply_options(optimizer: MegatronOptimizer, options: OptimizerConfig) -> None:
    """Make the run's options those of every parameter group.

    megatron-core only marks the groups that are not to decay (``wd_mult``) and leaves it to its trainer's scheduler to act on that; and a
    loaded checkpoint brings the options that it was saved with.
    """
    for group in optimizer.param_groups:
        group["betas"], group["eps"] = (options.beta1, options.beta2), options.eps
        group["weight_decay"] = options.weight_decay * group["wd_mult"]
        if USING_PYTORCH_OPTIMIZER:
            group["fused"] = True


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    """Set the rate of every parameter group for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _allocate_state(adamw: torch.optim.AdamW) -> None:
    """Give AdamW its whole state now, so that a checkpoint looks the same before and after the first step."""
    for group in adamw.param_groups:
        for parameter in group["params"]:
            adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
