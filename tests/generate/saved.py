"""Run directories whose model has random weights, saved by any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hybrid.config import RunConfig
from megatron_hybrid.run_directory import prepare_run_directory
from megatron_hybrid.substrate.groups import initialize, shutdown
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from megatron_hybrid.tasks.pretrain import Pretraining
from megatron_hybrid.train.trainer import Trainer
from tests.runs import small_run, write_corpus


def train(run: RunConfig) -> None:
    """Train to the end and save; runs on every rank."""
    substrate = initialize(run)
    config = build_transformer_config(run, substrate)
    prepare_run_directory(run, substrate)
    Trainer(run, Pretraining(run, config, substrate), config, substrate).train()
    shutdown(substrate)


def save_run(folder: Path, tokenizer: Path, run_ranks: Callable[..., Any], **sections: Any) -> Path:
    """A run directory of one step, on one rank; weights large enough that its text is no constant."""
    write_corpus(folder / "text")
    run = small_run(
        folder,
        run_dir=folder / "small",
        model={"init_std": 0.15},
        data={"tokenizer": {"kind": "huggingface", "path": tokenizer}},
        train={"steps": 1},
        **sections,
    )
    run_ranks(train, 1, run)
    return run.run_dir
