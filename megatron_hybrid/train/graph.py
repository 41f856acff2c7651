"""Forward and backward of a micro-batch as one CUDA graph, so that the host launches a step instead of its thousands of kernels.

At a few thousand tokens per micro-batch a GPU is done with a kernel before Python has launched the next. The graph is captured once, after
an ordinary step has compiled every kernel, and replayed for each micro-batch over the same memory: inputs are copied in, gradients are
added into the data-parallel wrapper's buffers, as without it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_hybrid.config import RunConfig
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.train.task import Metrics, StepData, Task

_log = logging.getLogger(__name__)


def graph_obstacle(run: RunConfig, task: Task, substrate: Substrate) -> str | None:
    """Why a run's micro-batches cannot be a CUDA graph, in words that follow "because"; None when they can."""
    if substrate.device.type != "cuda":
        return "the run is not on a GPU"
    if not task.is_capturable:
        return "the task does not launch the same kernels for every micro-batch"
    if run.parallel.pipeline > 1:
        return f"parallel.pipeline={run.parallel.pipeline} exchanges activations within a step"
    if run.parallel.tensor > 1:
        # Not tried: NCCL cannot take a communicator down while a graph holds its collectives.
        return f"parallel.tensor={run.parallel.tensor} communicates within a pass"
    if run.parallel.overlap_grad_reduce:
        return "parallel.overlap_grad_reduce=true starts reductions within a backward pass"
    if run.parallel.recompute != "none":
        return f"parallel.recompute={run.parallel.recompute} saves and restores random states"
    return None


def make_graph(run: RunConfig, task: Task, chunks: list[DistributedDataParallel], substrate: Substrate) -> MicroBatchGraph | None:
    """The graph that ``runtime.cuda_graphs`` asks for; None where micro-batches are launched one kernel at a time.

    Raises:
        ValueError: graphs are asked for where they cannot be had.
    """
    obstacle = graph_obstacle(run, task, substrate)
    if run.runtime.cuda_graphs == "on" and obstacle is not None:
        raise ValueError(f"runtime.cuda_graphs=on cannot be had because {obstacle}; change one of them, or set cuda_graphs=auto")
    if run.runtime.cuda_graphs == "off" or obstacle is not None:
        return None
    (chunk,) = chunks
    return MicroBatchGraph(task, chunk)


class MicroBatchGraph:
    """One chunk's forward and backward over a micro-batch, captured when it is first run."""

    def __init__(self, task: Task, chunk: DistributedDataParallel) -> None:
        self.task, self.chunk = task, chunk
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def is_captured(self) -> bool:
        """Whether a step need only replay it."""
        return self._graph is not None

    def run(self, data: StepData) -> list[Metrics]:
        """Forward and backward over a step's micro-batches, with gradients finished; the metrics of each."""
        if not self.is_captured:
            self._capture(data.micro_batches[0])
        per_micro_batch, total_tokens = [], torch.zeros_like(self._num_tokens)
        for micro_batch in data.micro_batches:
            for name, tensor in _tensors(micro_batch):
                getattr(self._inputs, name).copy_(tensor, non_blocking=True)
            self._graph.replay()
            per_micro_batch.append({name: value.clone() for name, value in self._metrics.items()})
            total_tokens += self._num_tokens
        self.chunk.config.finalize_model_grads_func([self.chunk], total_tokens)
        return per_micro_batch

    def _capture(self, micro_batch: Any) -> None:
        start_s = time.perf_counter()
        device = next(self.chunk.parameters()).device
        self._inputs = replace(micro_batch, **{name: tensor.to(device, copy=True) for name, tensor in _tensors(micro_batch)})
        graph = torch.cuda.CUDAGraph()
        # On the stream that the wrapper's gradient hooks were made on. Other threads go on pinning memory meanwhile.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device), capture_error_mode="thread_local"):
            output, describe_loss = self.task.forward_step(iter([self._inputs]), self.chunk)
            loss_sum, self._num_tokens, self._metrics = describe_loss(output)
            loss_sum.backward()
        self._graph = graph
        _log.info("captured forward and backward of a micro-batch as a CUDA graph in %.1f s", time.perf_counter() - start_s)


def _tensors(micro_batch: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a micro-batch, which is a dataclass, by field."""
    for field in fields(micro_batch):
        value = getattr(micro_batch, field.name)
        if isinstance(value, Tensor):
            yield field.name, value
