"""One optimizer step, and one evaluation, through megatron-core's schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import distributed

from megatron_hybrid.data.hashing import combine_hashes
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.exit_codes import RunError
from megatron_hybrid.train.float8 import held_weights
from megatron_hybrid.train.graph import MicroBatchGraph
from megatron_hybrid.train.task import Metrics, StatefulTask, StepData, Task


class NonFiniteError(RunError):
    """The loss or the gradient is not a finite number; nothing can be gained by going on."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step came to; the same on every rank."""

    metrics: dict[str, float]
    """The task's metrics, averaged by weight over the whole step."""
    grad_norm: float
    """Global gradient norm before clipping."""
    data_hash: int
    """Hash of the step's samples, whatever rank read them."""


def train_step(
    task: Task,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    data: StepData,
    substrate: Substrate,
    graph: MicroBatchGraph | None = None,
) -> StepResult:
    """Run forward and backward over the step's micro-batches, through ``graph`` where there is one, and update the weights.

    Raises:
        NonFiniteError: the loss is not finite, before the update; or the gradient norm is not, and then the message says whether the
            weights were updated.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    with held_weights(chunks):
        per_micro_batch = _run_schedule(task, chunks, data, forward_only=False) if graph is None else graph.run(data)
    metrics = _reduce(task, per_micro_batch, substrate)
    if not math.isfinite(metrics["loss"]):
        raise NonFiniteError(f"loss is {metrics['loss']}; the weights were not updated")
    updated, grad_norm, _ = optimizer.step()
    if not math.isfinite(grad_norm):
        raise NonFiniteError(
            f"gradient norm is {grad_norm} at loss {metrics['loss']:.6g}; the weights were {'' if updated else 'not '}updated"
        )
    if isinstance(task, StatefulTask):
        task.finish_step()
    return StepResult(metrics, float(grad_norm), _reduce_hash(data.partial_hash, substrate))


@torch.no_grad()
def evaluate(
    task: Task,
    chunks: list[DistributedDataParallel],
    batches: Iterable[StepData],
    substrate: Substrate,
    *,
    stop_requested: Callable[[], bool],
) -> dict[str, float] | None:
    """Run forward over all batches and average the metrics by weight over all of them; callers put the model into eval mode.

    Returns:
        The metrics, the same on every rank; None when ``stop_requested`` (agreed on by all ranks) came true before the last batch.
    """
    per_micro_batch: list[Metrics] = []
    for data in batches:
        if stop_requested():
            return None
        per_micro_batch += _run_schedule(task, chunks, data, forward_only=True)
    return _reduce(task, per_micro_batch, substrate)


def _run_schedule(task: Task, chunks: list[DistributedDataParallel], data: StepData, *, forward_only: bool) -> list[Metrics]:
    """The metrics of each micro-batch; an empty list away from the last pipeline stage."""
    sequence_length, micro_batch_size = task.micro_batch_shape
    return get_forward_backward_func()(
        forward_step_func=task.forward_step,
        data_iterator=[iter(data.micro_batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(data.micro_batches),
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


def _reduce(task: Task, per_micro_batch: list[Metrics], substrate: Substrate) -> dict[str, float]:
    """Weighted averages over micro-batches, data-parallel ranks and (where only the last one knows) pipeline stages."""
    totals = torch.zeros(len(task.metric_names), 2, dtype=torch.float64, device=substrate.device)
    for metrics in per_micro_batch:
        totals += torch.stack([metrics[name] for name in task.metric_names])
    distributed.all_reduce(totals, group=substrate.data_group)
    distributed.all_reduce(totals, group=substrate.pipeline_group)
    sums, weights = totals.cpu().unbind(1)
    return dict(zip(task.metric_names, (sums / weights).tolist(), strict=True))


def _reduce_hash(partial: int, substrate: Substrate) -> int:
    total = torch.tensor(partial, dtype=torch.int64, device=substrate.device)
    distributed.all_reduce(total, group=substrate.data_group)
    return combine_hashes([int(total)])
