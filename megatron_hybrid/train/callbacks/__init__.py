"""The callbacks a run is given, by its logging options."""

from __future__ import annotations

from megatron_hybrid.config import RunConfig
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.train.callback import Callback
from megatron_hybrid.train.callbacks.console import ConsoleLog
from megatron_hybrid.train.callbacks.float8 import float8_callbacks
from megatron_hybrid.train.callbacks.loss_curve import LossCurve
from megatron_hybrid.train.callbacks.metrics_file import MetricsFile
from megatron_hybrid.train.callbacks.tensorboard import TensorBoardLog
from megatron_hybrid.train.callbacks.validation import Validation
from megatron_hybrid.train.callbacks.wandb import WandbLog


def standard_callbacks(run: RunConfig, substrate: Substrate) -> list[Callback]:
    """Validation on every rank; everything that writes or prints on rank 0 alone.

    Raises:
        ValueError: a logger was asked for whose package is not installed.
    """
    callbacks: list[Callback] = []
    if substrate.rank == 0:
        callbacks += [ConsoleLog(run), MetricsFile(run), LossCurve(run)]
        if run.logging.tensorboard:
            callbacks.append(TensorBoardLog(run))
        if run.logging.wandb_project:
            callbacks.append(WandbLog(run))
    callbacks += float8_callbacks(run, is_first_rank=substrate.rank == 0)
    if run.validation.sources:
        # Last, so that a step is reported before the validation that follows it.
        callbacks.append(Validation())
    return callbacks
