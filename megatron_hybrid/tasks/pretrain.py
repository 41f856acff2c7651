"""Language-model pretraining as a task: next-token prediction over a blended stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hybrid.config import RunConfig
from megatron_hybrid.data.build import build_train_stream, build_validation_streams
from megatron_hybrid.data.loader import BatchLoader, MicroBatch
from megatron_hybrid.data.stream import SampleStream, require_same_data
from megatron_hybrid.layout.flops import training_flops_per_token
from megatron_hybrid.model.build import build_chunks
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.train.task import LossFunction, Metrics, StepData


class Pretraining:
    """Trains a HybridModel on tokenised text (a ``train.task.Task``).

    Raises:
        ValueError: at construction, when a corpus or the tokenizer does not fit the run.
    """

    metric_names = ("loss",)
    is_capturable = True

    def __init__(self, run: RunConfig, config: TransformerConfig, substrate: Substrate) -> None:
        self.run, self.config, self.substrate = run, config, substrate
        length = run.data.sequence_length
        self.micro_batch_shape = (length, run.train.micro_batch_size)
        self.flops_per_sample = length * training_flops_per_token(run.model, length)
        self.stream = build_train_stream(run)
        self.validation_streams = build_validation_streams(run)

    def build_chunks(self) -> list[HybridModel]:
        """This rank's parts of the model."""
        return build_chunks(self.run, self.config, self.substrate)

    def training_data(self, first_sample: int) -> Iterator[StepData]:
        """The run's steps from a global sample index on."""
        return self._read(self.stream, first_sample, None)

    def validation_data(self) -> Mapping[str, Callable[[], Iterator[StepData]]]:
        """Each validation source, from its beginning every time."""
        stop = self.run.validation.num_batches * self.run.train.global_batch_size
        return {name: partial(self._read, stream, 0, stop) for name, stream in self.validation_streams.items()}

    def forward_step(self, micro_batches: Iterator[MicroBatch], chunk: HybridModel) -> tuple[Tensor, LossFunction]:
        """Next-token loss of the next micro-batch, summed over tokens."""
        batch = next(micro_batches)
        tokens_BL, labels_BL, loss_mask_BL, segment_ids_BL = (
            tensor.to(self.substrate.device, non_blocking=True)
            for tensor in (batch.tokens, batch.labels, batch.loss_mask, batch.segment_ids)
        )
        output = chunk(
            tokens_BL,
            labels_BL=labels_BL,
            loss_mask_BL=loss_mask_BL,
            segment_ids_BL=segment_ids_BL if self.run.data.reset_at_documents else None,
        )
        return output, partial(_describe_loss, loss_mask_BL)

    def architecture(self) -> dict[str, Any]:
        """The model's options that decide its weights, and what they mean."""
        return self.run.model.architecture()

    def data_fingerprint(self) -> dict[str, Any]:
        """The stream's own."""
        return self.stream.fingerprint()

    def check_fingerprint(self, saved: dict[str, Any]) -> None:
        """Refuse another stream, naming what differs."""
        require_same_data(saved, self.stream.fingerprint())

    def _read(self, stream: SampleStream, first_sample: int, stop: int | None) -> Iterator[StepData]:
        train = self.run.train
        loader = BatchLoader(
            stream,
            position=first_sample,
            stop=stop,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            data_rank=self.substrate.data_rank,
            data_size=self.substrate.data_size,
            num_workers=self.run.data.num_workers,
            pin_memory=self.substrate.device.type == "cuda",
        )
        with loader:
            for step in loader:
                yield StepData(list(step.micro_batches), train.global_batch_size, step.partial_hash)


def _describe_loss(loss_mask_BL: Tensor, loss_sum: Tensor) -> tuple[Tensor, Tensor, Metrics]:
    """The schedule's (sum, token count, metrics); runs on the last stage."""
    num_tokens = loss_mask_BL.sum()
    return loss_sum, num_tokens.int(), {"loss": torch.stack([loss_sum.detach(), num_tokens])}
