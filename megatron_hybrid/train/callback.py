"""What may watch a run. Everything optional is a callback; the loop knows none of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_hybrid.substrate.exit_codes import ExitCode

if TYPE_CHECKING:
    from megatron_hybrid.train.progress import StepRecord
    from megatron_hybrid.train.task import StepData
    from megatron_hybrid.train.trainer import Trainer


class Callback:
    """Does nothing at every event; subclasses override what they need.

    Callbacks run in order, on every rank they are given to. One that communicates must be on all ranks.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process, with weights and position in place."""

    def before_step(self, trainer: Trainer, data: StepData) -> None:
        """Before each optimizer step, with the data it is about to use."""

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """After each optimizer step."""

    def after_validation(self, trainer: Trainer, losses: dict[str, float]) -> None:
        """After a validation: source name -> mean loss per token."""

    def on_report(self, trainer: Trainer, kind: str, values: dict[str, Any]) -> None:
        """Something another callback measured at the present step, as plain JSON; ``kind`` says what."""

    def on_end(self, trainer: Trainer, exit_code: ExitCode) -> None:
        """After the last step and the last save of this process."""
