"""Runs a few steps in a given layout and reports, from every rank, what does not depend on the layout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_hybrid.config import RunConfig
from megatron_hybrid.layers.parameters import Declaration
from megatron_hybrid.substrate.groups import initialize, shutdown
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from megatron_hybrid.tasks.pretrain import Pretraining
from megatron_hybrid.train.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
from megatron_hybrid.train.step import train_step
from megatron_hybrid.train.trainer import connect_schedules


@dataclass
class Shard:
    """One rank's part of a parameter."""

    declaration: Declaration
    tensor_rank: int
    values: np.ndarray


@dataclass
class RankReport:
    """What one rank saw."""

    initial: dict[str, Shard]
    losses: list[float]
    grad_norms: list[float]
    hashes: list[int]


def train_in_layout(run: RunConfig, num_steps: int) -> RankReport:
    """Train ``num_steps`` steps; runs on every rank."""
    substrate = initialize(run)
    config = build_transformer_config(run, substrate)
    task = Pretraining(run, config, substrate)
    chunks = task.build_chunks()
    initial = {
        name: Shard(_picklable(parameter.declaration), substrate.tensor_rank, parameter.detach().float().cpu().numpy().copy())
        for chunk in chunks
        for name, parameter in chunk.named_global_parameters()
    }
    wrapped = wrap_data_parallel(chunks, run, config)
    optimizer = build_optimizer(wrapped, run)
    connect_schedules(config, wrapped, optimizer)
    report = RankReport(initial, [], [], [])
    data = task.training_data(0)
    for _ in range(num_steps):
        set_learning_rate(optimizer, run.optimizer.lr)
        result = train_step(task, wrapped, optimizer, next(data), substrate)
        report.losses.append(result.metrics["loss"])
        report.grad_norms.append(result.grad_norm)
        report.hashes.append(result.data_hash)
    data.close()
    shutdown(substrate)
    return report


def assemble(reports: list[RankReport], tensor_ranks: int) -> dict[str, np.ndarray]:
    """Put every parameter together from the ranks' shards, checking that copies agree."""
    shards: dict[str, dict[int, Shard]] = {}
    for report in reports:
        for name, shard in report.initial.items():
            first = shards.setdefault(name, {}).setdefault(shard.tensor_rank, shard)
            np.testing.assert_array_equal(first.values, shard.values, err_msg=name)
    return {name: _merge([by_rank[rank] for rank in range(tensor_ranks)]) for name, by_rank in shards.items()}


def _merge(shards: list[Shard]) -> np.ndarray:
    declaration = shards[0].declaration
    if declaration.axis is None:
        for shard in shards[1:]:
            np.testing.assert_array_equal(shards[0].values, shard.values)
        return shards[0].values
    parts = []
    for component, start in zip(declaration.components, _starts(declaration, len(shards)), strict=True):
        stop = start + component.size // len(shards)
        parts += [np.take(shard.values, range(start, stop), declaration.axis) for shard in shards]
    return np.concatenate(parts, declaration.axis)


def _starts(declaration: Declaration, num_shards: int) -> list[int]:
    sizes = [component.size // num_shards for component in declaration.components]
    return [sum(sizes[:index]) for index in range(len(sizes))]


def _picklable(declaration: Declaration) -> Declaration:
    return Declaration(declaration.global_shape, declaration.axis, declaration.components, initializer=None)
