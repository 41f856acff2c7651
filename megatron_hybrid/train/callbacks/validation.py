"""Held-out loss per source during training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from megatron_hybrid.train.callback import Callback
from megatron_hybrid.train.progress import StepRecord
from megatron_hybrid.train.step import evaluate
from megatron_hybrid.train.task import StepData

if TYPE_CHECKING:
    from megatron_hybrid.train.trainer import Trainer


class Validation(Callback):
    """Every ``validation.every_steps``, and at the end, averages the loss over each validation source. Runs on every rank."""

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step % trainer.run.validation.every_steps == 0 or trainer.is_finished:
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        for chunk in trainer.chunks:
            chunk.eval()
        losses = {}
        for source, steps in trainer.task.validation_data().items():
            loss = self._mean_loss(trainer, steps)
            if loss is None:
                break
            losses[source] = loss
        for chunk in trainer.chunks:
            chunk.train()
        if losses:
            for callback in trainer.callbacks:
                callback.after_validation(trainer, losses)

    def _mean_loss(self, trainer: Trainer, steps: Callable[[], Iterator[StepData]]) -> float | None:
        """Mean per token over the source's batches, or None when the run was asked to stop meanwhile."""
        with contextlib.closing(steps()) as batches:
            metrics = evaluate(trainer.task, trainer.chunks, batches, trainer.substrate, stop_requested=trainer.stop.requested)
        return None if metrics is None else metrics["loss"]
