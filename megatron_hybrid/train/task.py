"""The seam between the trainer and what is trained.

The trainer owns the loop, the optimizer, checkpoints, faults and logging, and knows no model. A task brings the model, its data and the
loss of one micro-batch. Language-model pretraining is one task; distillation and vision training are others, and none has a loop of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer import MegatronModule
from torch import Tensor

Metrics = dict[str, Tensor]
"""Metric name -> [sum, weight] in a two-element fp32 tensor. Sums and weights are added over micro-batches and ranks, and only then
divided."""

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Metrics]]
"""Stage output -> (sum of losses, number of tokens it sums over as int32, metrics); runs on the last pipeline stage alone."""


@dataclass(frozen=True)
class StepData:
    """What one rank reads for one optimizer step."""

    micro_batches: list[Any]
    """In order; each is handed to the task's forward step once per model chunk."""
    num_samples: int
    """Samples of the step over all ranks."""
    partial_hash: int
    """This rank's share of the step's data hash; the shares of the data-parallel ranks are added modulo 2^63."""


class Task(Protocol):
    """What a trainer trains."""

    metric_names: tuple[str, ...]
    """Every name in the metrics of a micro-batch, ``loss`` first; known on all ranks, the metrics only on the last stage."""
    micro_batch_shape: tuple[int, int]
    """(sequence length, samples) of a micro-batch, for the pipeline's buffers."""
    is_capturable: bool
    """Whether the forward step launches the same kernels on the same shapes for every micro-batch, and micro-batches are dataclasses."""
    flops_per_sample: float
    """Exact training FLOPs of one sample; 0 where unknown."""

    def build_chunks(self) -> list[MegatronModule]:
        """Make this rank's model chunks, initialised, on the device, in model order."""

    def training_data(self, first_sample: int) -> Iterator[StepData]:
        """Steps from the given global sample index on. Closing the iterator stops its readers."""

    def validation_data(self) -> Mapping[str, Callable[[], Iterator[StepData]]]:
        """Source name -> the same steps anew on every call."""

    def forward_step(self, micro_batches: Iterator[Any], chunk: MegatronModule) -> tuple[Tensor, LossFunction]:
        """Take the next micro-batch and run one chunk over it (megatron-core's forward_step_func)."""

    def architecture(self) -> dict[str, Any]:
        """What decides the names and shapes of the weights, as plain JSON; a checkpoint of another architecture is refused."""

    def data_fingerprint(self) -> dict[str, Any]:
        """What decides the stream of samples, as plain JSON; resuming with another stream is refused."""

    def check_fingerprint(self, saved: dict[str, Any]) -> None:
        """Raise ValueError, naming the difference, when a checkpoint's stream is not this task's."""


@runtime_checkable
class StatefulTask(Task, Protocol):
    """A task that keeps something beside the weights, such as statistics of its targets, which a checkpoint has to hold."""

    def finish_step(self) -> None:
        """Called on every rank after each update: bring together what the step's micro-batches left, the same on all ranks."""

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """What this rank has to save, by key, as megatron-core's distributed checkpoints want it."""

    def take_state(self, loaded: dict[str, Tensor]) -> None:
        """Take over what was saved, by key."""

    def weight_state(self, saved_data: dict[str, Any]) -> dict[str, ShardedTensor]:
        """The part of ``sharded_state`` without which saved weights mean something else, for a run that starts from them alone.

        Args:
            saved_data: the ``data_fingerprint`` of the run that saved them.
        """

    def take_weight_state(self, loaded: dict[str, Tensor]) -> None:
        """Take over what ``weight_state`` asked for, by key."""
