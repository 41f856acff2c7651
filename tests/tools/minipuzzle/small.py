"""A small parent with weights in a checkpoint, and a compression of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.runs import small_run, write_corpus
from tests.train.training import train
from tools.minipuzzle.config import MiniPuzzleConfig

PATTERN = "M-M*-M-*"


def train_parent(folder: Path, num_steps: int = 4) -> None:
    """Write a corpus, and train a parent for a few steps into ``folder / "parent"``; runs on one rank."""
    write_corpus(folder / "text")
    write_corpus(folder / "held_out", seed=1)
    run = small_run(
        folder,
        run_dir=folder / "parent",
        model={"pattern": PATTERN},
        train={"steps": num_steps},
        validation={"sources": {"text": folder / "held_out"}, "num_batches": 2, "every_steps": 1000},
    )
    outcome = train(run, logged=True)
    assert outcome.last_step == num_steps
    from megatron_hybrid.config import dump_config

    (run.run_dir / "config.yaml").write_text(dump_config(run))


def compression(folder: Path, **sections: Any) -> MiniPuzzleConfig:
    """A compression of that parent."""
    options: dict[str, Any] = {
        "work_dir": folder / "work",
        "parent": str(folder / "parent"),
        "batch": {"global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
        "score": {"axes": ["layers", "ffn", "mamba", "hidden"], "layer_samples": 6, "width_samples": 10},
        "search": {"ffn_hidden_sizes": [48, 64, 96], "num_tokens": 640, "num_evaluated": 4, "top_k": 2},
        "distill": {"short_tokens": 640, "long_tokens": 1280, "optimizer": {"lr": 1e-3}, "schedule": {"kind": "constant"}},
        "runtime": {"timeout_s": 60, "threads_per_rank": 1},
    }
    return MiniPuzzleConfig(**options | sections)
