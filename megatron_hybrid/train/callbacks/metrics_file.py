"""metrics.jsonl: every step, validation and other report as one JSON object a line, always written."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid.config import RunConfig
from megatron_hybrid.train.callback import Callback
from megatron_hybrid.train.progress import StepRecord

if TYPE_CHECKING:
    from megatron_hybrid.train.trainer import Trainer


class MetricsFile(Callback):
    """Appends to RUN_DIR/metrics.jsonl.

    On resume, lines of steps after the checkpoint are dropped first: those steps are about to be repeated, and the file should read as one
    run.
    """

    def __init__(self, run: RunConfig) -> None:
        self.path = metrics_path(run.run_dir)

    def on_start(self, trainer: Trainer) -> None:
        if self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= trainer.state.step]
            replacement = self.path.with_suffix(".partial")
            replacement.write_text("".join(json.dumps(line) + "\n" for line in kept))
            replacement.replace(self.path)

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        self._append({"kind": "step", **asdict(record)})

    def after_validation(self, trainer: Trainer, losses: dict[str, float]) -> None:
        self._append({"kind": "validation", "step": trainer.state.step, "losses": losses})

    def on_report(self, trainer: Trainer, kind: str, values: dict[str, Any]) -> None:
        self._append({"kind": kind, "step": trainer.state.step, **values})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def metrics_path(run_dir: Path) -> Path:
    """Where a run's metrics are."""
    return run_dir / "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a last one cut short by a crash is left out."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
