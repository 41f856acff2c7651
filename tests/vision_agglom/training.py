"""Trains a few steps of a small distillation in a layout and reports, from every rank, what does not depend on the layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_hybrid.substrate.groups import initialize, shutdown
from megatron_hybrid.train.callback import Callback
from megatron_hybrid.train.trainer import Trainer
from tests.train.layouts import Shard, _picklable
from tests.vision_agglom.small import RandomTeacher, SyntheticStream
from vision_agglom.config.schema import VisionConfig
from vision_agglom.students.build import build_transformer_config
from vision_agglom.task import Distillation


@dataclass
class VisionReport:
    """What one rank saw."""

    initial: dict[str, Shard] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    state: dict[str, np.ndarray] = field(default_factory=dict)
    """The task's own state at the end."""
    weights: dict[str, np.ndarray] = field(default_factory=dict)


class _Recorder(Callback):
    def __init__(self, report: VisionReport) -> None:
        self.report = report

    def after_step(self, trainer: Trainer, record: Any) -> None:
        self.report.losses.append(record.metrics["loss"])
        self.report.metrics.append(record.metrics)
        self.report.grad_norms.append(record.grad_norm)
        self.report.hashes.append(record.data_hash)
        self.report.rates.append(record.learning_rate)


def train_vision(run: VisionConfig) -> VisionReport:
    """Train to the end, resuming from what the run's directory holds; runs on every rank."""
    substrate = initialize(run)
    config = build_transformer_config(run, substrate)
    report = VisionReport()
    task = Distillation(run, config, substrate, load=RandomTeacher, open_stream=SyntheticStream)
    trainer = Trainer(run, task, config, substrate, [_Recorder(report)], task.plan.learning_rate)
    for chunk in trainer.chunks:
        for name, parameter in chunk.module.named_global_parameters():
            report.initial[name] = Shard(
                _picklable(parameter.declaration), substrate.tensor_rank, parameter.detach().float().numpy().copy()
            )
    trainer.resume()
    trainer.train()
    report.state = {name: tensor.cpu().numpy().copy() for name, tensor in task._named_state()}
    for chunk in trainer.chunks:
        report.weights |= {name: parameter.detach().float().numpy().copy() for name, parameter in chunk.module.named_global_parameters()}
    shutdown(substrate)
    return report
