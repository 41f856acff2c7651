"""Writes tests/golden/losses.json: python -m tests.golden.make_losses "why they change"."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.distributed import run_ranks
from tests.runs import small_run, write_corpus
from tests.train.layouts import train_in_layout

GOLDEN = Path(__file__).parent / "losses.json"
NUM_STEPS = 30
RUNS = {
    "fp32": {"optimizer": {"lr": 1e-3}},
    "bf16": {"optimizer": {"lr": 1e-3}, "train": {"precision": "bf16"}},
    "fp32-rope-whole-samples": {
        "optimizer": {"lr": 1e-3},
        "model": {"pattern": "*-*-", "position_embedding": "rope"},
        "data": {"reset_at_documents": False},
    },
    "fp8-delayed": {
        "optimizer": {"lr": 1e-3},
        "model": {"mamba_num_heads": 32, "mamba_head_dim": 4},
        "data": {"sequence_length": 48},
        "train": {"precision": "bf16"},
        "fp8": {"recipe": "delayed", "delayed": {"history_length": 8}, "bf16_layers_at_start": 1, "bf16_layers_at_end": 1},
    },
}


def losses(sections: dict) -> list[float]:
    """Train one run on one rank."""
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "text")
        (report,) = run_ranks(train_in_layout, 1, small_run(Path(folder), **sections), NUM_STEPS)
    return report.losses


if __name__ == "__main__":
    golden = {"command": "python -m tests.golden.make_losses", "reason": sys.argv[1]}
    GOLDEN.write_text(json.dumps(golden | {"losses": {name: losses(sections) for name, sections in RUNS.items()}}, indent=1) + "\n")
