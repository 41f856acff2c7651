"""Small float8 runs, and what a rank's training did to its scaling state."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_hybrid.config import RunConfig
from megatron_hybrid.train.callback import Callback
from megatron_hybrid.train.float8 import float8_linears
from tests.runs import small_run
from tests.train.training import Outcome, train

MODEL = {"pattern": "M-*M", "mamba_num_heads": 32, "mamba_head_dim": 4}
"""Makes every linear of the small model a multiple of 16, at two tensor ranks too."""
NUM_LINEARS = 8


def float8_run(folder: Path, **sections: Any) -> RunConfig:
    """``small_run`` in float8: delayed scaling with a window of four steps, no layer kept out, four steps of four micro-batches."""
    fp8 = sections.pop("fp8", {})
    if fp8.get("recipe") != "off":
        fp8 = {"recipe": "delayed", "delayed": {"history_length": 4}, **fp8}
    model = {**MODEL, **sections.pop("model", {})}
    optimizer = {"lr": 1e-3, **sections.pop("optimizer", {})}
    data = {"sequence_length": 48, **sections.pop("data", {})}
    train = {"steps": 4, "global_batch_size": 4, **sections.pop("train", {})}
    return small_run(folder, fp8=fp8, model=model, optimizer=optimizer, data=data, train=train, **sections)


@dataclass
class ScalingRecorder(Callback):
    """Keeps each linear's history and scales after every step."""

    steps: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=list)

    def after_step(self, trainer: Any, record: Any) -> None:
        linears = float8_linears(trainer.chunks)
        self.steps.append({linear.name: (linear.amax_history_RH.clone(), linear.scale_R.clone()) for linear in linears})


class MessageKeeper(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@dataclass
class Float8Outcome:
    """What one rank saw."""

    outcome: Outcome
    scaling: list[dict[str, tuple[torch.Tensor, torch.Tensor]]]
    """After each step: linear -> (amax history [R, H], scales [R])."""
    messages: list[str]

    @property
    def losses(self) -> list[float]:
        return self.outcome.losses


def train_float8(run: RunConfig, *, logged: bool = False) -> Float8Outcome:
    """Train to the end or a stop, under delayed scaling if in float8 at all; runs on every rank."""
    recorder, keeper = ScalingRecorder(), MessageKeeper()
    logger = logging.getLogger("megatron_hybrid.train.float8")
    logger.addHandler(keeper)
    delayed = run.fp8.recipe == "delayed"
    try:
        outcome = train(run, (recorder,) if delayed else (), logged=logged)
    finally:
        logger.removeHandler(keeper)
    return Float8Outcome(outcome, recorder.steps, keeper.messages)
