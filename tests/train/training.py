"""Runs the trainer on ranks and brings back what a test compares."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_hybrid.config import RunConfig
from megatron_hybrid.substrate.exit_codes import RunError
from megatron_hybrid.substrate.groups import destroy_groups, initialize, shutdown
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from megatron_hybrid.tasks.pretrain import Pretraining
from megatron_hybrid.train.callback import Callback
from megatron_hybrid.train.callbacks import standard_callbacks
from megatron_hybrid.train.trainer import Trainer


@dataclass
class Outcome:
    """What one rank's training came to."""

    exit_code: int = 0
    first_step: int = 0
    last_step: int = 0
    losses: list[float] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    optimizer: list[torch.Tensor] = field(default_factory=list)
    """Masters, or weights and remainders, and moments in the optimizer's own order."""


class Recorder(Callback):
    """Keeps every step's loss and data hash."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def on_start(self, trainer: Trainer) -> None:
        self.outcome.first_step = trainer.state.step

    def after_step(self, trainer: Trainer, record: Any) -> None:
        self.outcome.losses.append(record.metrics["loss"])
        self.outcome.hashes.append(record.data_hash)


class KillAt(Callback):
    """Sends this process a signal after a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def after_step(self, trainer: Trainer, record: Any) -> None:
        if record.step == self.step:
            os.kill(os.getpid(), self.number)


def train(run: RunConfig, extra_callbacks: tuple[Callback, ...] = (), *, logged: bool = False) -> Outcome:
    """Train to the end or a stop; runs on every rank."""
    substrate = initialize(run)
    config = build_transformer_config(run, substrate)
    outcome = Outcome()
    callbacks = [Recorder(outcome), *extra_callbacks, *(standard_callbacks(run, substrate) if logged else ())]
    if logged:
        run.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(run, Pretraining(run, config, substrate), config, substrate, callbacks)
    trainer.resume()
    outcome.exit_code = int(trainer.train())
    outcome.last_step = trainer.state.step
    for chunk in trainer.chunks:
        outcome.weights |= {name: parameter.detach().clone() for name, parameter in chunk.module.named_global_parameters()}
    for part in trainer.optimizer.chained_optimizers:
        for parameter, state in part.optimizer.state.items():
            outcome.optimizer += [parameter.detach().clone(), *(state[name].clone() for name in sorted(state))]
    shutdown(substrate)
    return outcome


def raised_by(fn: Callable[..., Any], *arguments: Any) -> str:
    """The message of the error, meant for the user, that ``fn`` raises; runs on every rank."""
    try:
        fn(*arguments)
    except (ValueError, RunError) as error:
        destroy_groups()
        return str(error)
    return "nothing was raised"
