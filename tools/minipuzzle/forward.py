"""Forward passes that no backward follows, over any layout of tensor, pipeline and data ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_hybrid.config import RunConfig
from megatron_hybrid.data.loader import BatchLoader, MicroBatch
from megatron_hybrid.data.stream import SampleStream
from megatron_hybrid.layers.mlp import MlpLayer
from megatron_hybrid.layers.sequence import Sequence
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.substrate.context import Substrate


class StageForward:
    """One rank's stage of a model, and how hidden states come to it and go on from it."""

    def __init__(self, chunk: HybridModel, run: RunConfig, substrate: Substrate) -> None:
        assert run.parallel.virtual_pipeline == 1 and not run.parallel.sequence_parallel, "see forward_run"
        self.chunk, self.substrate = chunk, substrate
        self.resets_at_documents = run.data.reset_at_documents
        self.dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
        self.hidden_size = run.model.hidden_size

    def describe(self, batch: MicroBatch) -> Sequence:
        """What the layers need to know of a micro-batch's sequences."""
        segment_ids_BL = batch.segment_ids.to(self.substrate.device) if self.resets_at_documents else None
        return self.chunk.describe_sequence(batch.tokens.shape[1], segment_ids_BL)

    def enter(self, batch: MicroBatch, num_variants: int = 1) -> list[Tensor]:
        """The hidden states [L, B, D] before this stage's first layer: the embedding's, or those that the stage before passed on."""
        if self.chunk.pre_process:
            assert num_variants == 1
            return [self.chunk.embedding(batch.tokens.to(self.substrate.device))]
        size_B, length = batch.tokens.shape
        hidden = [
            torch.empty(length, size_B, self.hidden_size, dtype=self.dtype, device=self.substrate.device) for _ in range(num_variants)
        ]
        for tensor in hidden:
            dist.recv(tensor, parallel_state.get_pipeline_model_parallel_prev_rank(), group=self.substrate.pipeline_group)
        return hidden

    def leave(self, hidden: list[Tensor]) -> list[Tensor]:
        """Pass the states on; on the last stage, return them after the final norm."""
        if self.chunk.post_process:
            return [self.chunk.decoder.final_norm(tensor) for tensor in hidden]
        for tensor in hidden:
            dist.send(tensor.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group=self.substrate.pipeline_group)
        return []


@contextlib.contextmanager
def activation_replaced(layer: MlpLayer, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Pass an MLP layer's activated neurons [L, B, F of this rank] through ``replace`` on their way to the second linear.

    Through the activation itself: a layer need not call its linears as modules, where a hook would see it.
    """
    activate = layer.mlp.squared_relu
    layer.mlp.squared_relu = lambda inner_LBF: replace(activate(inner_LBF))
    try:
        yield
    finally:
        layer.mlp.squared_relu = activate


def read_micro_batches(stream: SampleStream, num_samples: int, run: RunConfig, substrate: Substrate) -> Iterator[MicroBatch]:
    """Yield this data rank's micro-batches of samples 0 to ``num_samples``; the last may go beyond, callers leave those samples out."""
    micro = run.train.micro_batch_size
    with BatchLoader(
        stream,
        position=0,
        stop=num_samples,
        global_batch_size=micro * substrate.data_size,
        micro_batch_size=micro,
        data_rank=substrate.data_rank,
        data_size=substrate.data_size,
        num_workers=run.data.num_workers,
        pin_memory=substrate.device.type == "cuda",
    ) as loader:
        for step in loader:
            yield from step.micro_batches
