"""What every stage leaves, and where: plain files that a person can read, and edit before the next stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WorkFiles:
    """The paths under ``work_dir``."""

    work_dir: Path

    @property
    def scores(self) -> Path:
        """Importance of layers, and beside it (.safetensors) of neurons, heads and channels."""
        return self.work_dir / "scores.json"

    @property
    def latency(self) -> Path:
        """Times of layers, measured on this device."""
        return self.work_dir / "latency.json"

    @property
    def candidates(self) -> Path:
        """All candidates, the ranked ones first; ``chosen`` says which are pruned."""
        return self.work_dir / "candidates.json"

    @property
    def results(self) -> Path:
        """What every model came to on validation text."""
        return self.work_dir / "results.json"

    @property
    def report(self) -> Path:
        """The page."""
        return self.work_dir / "report.html"

    def pruned(self, name: str) -> Path:
        """Run directory with a candidate's weights as pruned."""
        return self.work_dir / "pruned" / name

    def run_dir(self, kind: str, name: str) -> Path:
        """Run directory of a training: kind is short, long, scratch or finetune."""
        return self.work_dir / kind / name
