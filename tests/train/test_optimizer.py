"""The options of the optimizer's parameter groups: what decays, and whose options hold after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.config import RunConfig
from megatron_hybrid.train.callback import Callback
from tests.runs import small_run, write_corpus
from tests.train.training import train


class GroupRecorder(Callback):
    """Keeps what the groups hold when training starts."""

    def __init__(self) -> None:
        self.groups: list[dict[str, Any]] = []

    def on_start(self, trainer: Any) -> None:
        names = ("weight_decay", "betas", "eps", "fused")
        for group in trainer.optimizer.param_groups:
            self.groups.append({"num_dims": {parameter.dim() for parameter in group["params"]}} | {name: group[name] for name in names})


def train_and_record(run: RunConfig) -> list[dict[str, Any]]:
    recorder = GroupRecorder()
    train(run, (recorder,))
    return recorder.groups


@pytest.mark.parametrize("distributed_optimizer", [True, False], ids=["distributed", "plain"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_vectors_do_not_decay_and_a_resumed_run_has_its_own_options(
    precision: str, distributed_optimizer: bool, tmp_path: Path, run_ranks: Any
) -> None:
    write_corpus(tmp_path / "text")
    parallel = {"distributed_optimizer": distributed_optimizer}

    def run(optimizer: dict[str, Any], steps: int) -> RunConfig:
        options = {"lr": 1e-3, **optimizer}
        train_options = {"precision": precision, "exit_after_steps": steps}
        return small_run(tmp_path, run_dir=tmp_path / "run", parallel=parallel, optimizer=options, train=train_options)

    first = run_ranks(train_and_record, 1, run({}, 1))[0]
    assert sorted(group["weight_decay"] for group in first) == [0.0, 0.1]
    if not distributed_optimizer:
        # The distributed optimizer's shards are flat, whatever they are of.
        assert {dims for group in first if group["weight_decay"] == 0 for dims in group["num_dims"]} == {1}
    changed = {"weight_decay": 0.3, "beta2": 0.99, "eps": 1e-6}
    second = run_ranks(train_and_record, 1, run(changed, 1))[0]
    assert sorted(group["weight_decay"] for group in second) == [0.0, 0.3]
    assert all(group["betas"] == (0.9, 0.99) and group["eps"] == 1e-6 and group["fused"] for group in second)
