"""A small parent with weights in a checkpoint, and a compression of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.runs import small_run, write_corpus
from tests.train.training import train
from tools.minipuzzle.config import MiniPuzzleConfig
from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.results import load_results
from tools.minipuzzle.run import report, run

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


def whole_plan(folder: Path, **sections: Any) -> MiniPuzzleConfig:
    """That compression with both baselines and a loss between layers: what the fixture ``work`` is made from."""
    distill = {
        "short_tokens": 640,
        "long_tokens": 1280,
        "optimizer": {"lr": 1e-3},
        "schedule": {"kind": "constant"},
        "layer_loss": {"kind": "mse", "weight": 0.1},
    }
    distill |= sections.pop("distill", {})
    return compression(folder, baselines={"scratch": True, "finetune": True}, distill=distill, **sections)


def last_stage(config: MiniPuzzleConfig) -> str:
    """The last stage whose file is there."""
    files = WorkFiles(config.work_dir)
    if files.report.exists():
        return "report"
    if (config.work_dir / "scratch").exists():
        return "distill"
    pruned = (config.work_dir / "pruned").exists()
    return "prune" if pruned else "search" if files.candidates.exists() else "score" if files.scores.exists() else ""


def run_plan(folder: Path) -> int:
    """All stages; runs on one rank. Returns the exit code."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    config = whole_plan(folder)
    for until in ("score", "search", "prune", "distill"):
        assert run(config, until) == 0
        assert last_stage(config) == until
    # By itself, the report times decoding too.
    code = report(config)
    assert len(load_results(WorkFiles(config.work_dir)).speeds) == 2
    return code
