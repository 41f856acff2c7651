"""Weights & Biases, where it is installed."""

from __future__ import annotations

import hashlib
import importlib.util
from typing import TYPE_CHECKING, Any

from megatron_hybrid.config import RunConfig
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.train.callback import Callback
from megatron_hybrid.train.callbacks.tensorboard import report_scalars, scalars
from megatron_hybrid.train.progress import StepRecord

if TYPE_CHECKING:
    from megatron_hybrid.train.trainer import Trainer


class WandbLog(Callback):
    """Logs to the project named in ``logging.wandb_project``; a resumed run continues its curve.

    Raises:
        ValueError: at construction, when wandb is not installed.
    """

    def __init__(self, run: RunConfig) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ValueError("logging.wandb_project needs the wandb package: pip install wandb, or leave the option out")
        self.config = run

    def on_start(self, trainer: Trainer) -> None:
        import wandb

        self.run = wandb.init(
            project=self.config.logging.wandb_project,
            name=str(self.config.run_dir),
            # One run per run directory: its last name alone may be anyone's.
            id=hashlib.sha256(str(self.config.run_dir.resolve()).encode()).hexdigest()[:16],
            dir=self.config.run_dir,
            config=self.config.model_dump(mode="json"),
            resume="allow",
        )

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        self.run.log(scalars(record), step=record.step)

    def after_validation(self, trainer: Trainer, losses: dict[str, float]) -> None:
        self.run.log({f"validation/{source}": loss for source, loss in losses.items()}, step=trainer.state.step)

    def on_report(self, trainer: Trainer, kind: str, values: dict[str, Any]) -> None:
        self.run.log(report_scalars(kind, values), step=trainer.state.step)

    def on_end(self, trainer: Trainer, exit_code: ExitCode) -> None:
        self.run.finish()
