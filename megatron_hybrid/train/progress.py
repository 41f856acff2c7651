"""Speed, memory and time left: what a step says about the run beside its loss."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_hybrid.config import RunConfig
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.environment import peak_tflops
from megatron_hybrid.train.step import StepResult

if TYPE_CHECKING:
    from megatron_hybrid.train.trainer import TrainState


@dataclass(frozen=True)
class StepRecord:
    """All that is logged about one step."""

    step: int
    total_steps: int
    """Steps done when the run ends; not ``train.steps`` if the batch size changed on the way."""
    tokens: int
    """Tokens consumed so far."""
    samples: int
    """Data position: global index of the next sample."""
    total_samples: int
    metrics: dict[str, float]
    """The task's metrics, ``loss`` among them."""
    grad_norm: float
    learning_rate: float
    step_s: float
    """Wall time since the last record: the step, and whatever the callbacks did after the one before."""
    warm_up: str | None
    """What this step did once for all later ones; its time then says nothing of theirs, and the four figures of speed are None."""
    tokens_per_s: float | None
    """Over all ranks."""
    tflops_per_rank: float | None
    """Model TFLOP/s of one rank by the exact count; recomputation is not counted."""
    mfu: float | None
    """Share of the device's peak; None where the peak is unknown."""
    memory_gib: float
    """Peak memory of this rank so far: of the device's allocator, or on a CPU of the process."""
    eta_s: float | None
    """Time left at the average speed since the warm-up."""
    data_hash: str
    """Hash of the samples of this step, the same in every layout."""


class Progress:
    """Turns step results into records, keeping time."""

    def __init__(self, run: RunConfig, flops_per_sample: float, substrate: Substrate) -> None:
        self.run, self.flops_per_sample, self.substrate = run, flops_per_sample, substrate
        self.peak_tflops = run.logging.peak_tflops or peak_tflops(substrate.device)
        self.num_steps = self.num_timed_steps = 0
        self.timed_s = 0.0
        self.last_s = time.perf_counter()

    def record(self, state: TrainState, result: StepResult, learning_rate: float, num_samples: int, warm_up: str | None) -> StepRecord:
        """Describe the step of ``num_samples`` that just ended; ``state`` already counts it. ``warm_up`` is as in the record."""
        now_s = time.perf_counter()
        step_s, self.last_s = now_s - self.last_s, now_s
        self.num_steps += 1
        steps_left = self.run.steps_left(state.samples)
        tokens_per_s = tflops = mfu = eta_s = None
        if warm_up is None:
            self.num_timed_steps += 1
            self.timed_s += step_s
            samples_per_s = num_samples / step_s
            tokens_per_s = samples_per_s * self.run.tokens_per_sample
            tflops = samples_per_s * self.flops_per_sample / self.substrate.world_size / 1e12
            mfu = tflops / self.peak_tflops if self.peak_tflops else None
            eta_s = steps_left * self.timed_s / self.num_timed_steps
        return StepRecord(
            step=state.step,
            total_steps=state.step + steps_left,
            tokens=state.samples * self.run.tokens_per_sample,
            samples=state.samples,
            total_samples=self.run.total_samples,
            metrics=result.metrics,
            grad_norm=result.grad_norm,
            learning_rate=learning_rate,
            step_s=step_s,
            warm_up=warm_up,
            tokens_per_s=tokens_per_s,
            tflops_per_rank=tflops,
            mfu=mfu,
            memory_gib=_peak_memory_gib(self.substrate.device),
            eta_s=eta_s,
            data_hash=f"{result.data_hash:016x}",
        )


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
