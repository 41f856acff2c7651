"""loss.png: every teacher's losses over the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.train.callback import Callback
from megatron_hybrid.train.callbacks.metrics_file import metrics_path, read_metrics
from vision_agglom.config.schema import VisionConfig

if TYPE_CHECKING:
    from megatron_hybrid.train.trainer import Trainer


class CurvesCallback(Callback):
    """Draws RUN_DIR/loss.png when the process ends, from metrics.jsonl, so that a resumed run shows all of itself."""

    def __init__(self, run: VisionConfig) -> None:
        self.run = run

    def on_end(self, trainer: Trainer, exit_code: ExitCode) -> None:
        draw_losses(self.run, self.run.run_dir / "loss.png")


def draw_losses(run: VisionConfig, picture: Path) -> None:
    """Plot spatial losses, summary losses and the total over steps; stages are marked."""
    # Imported here: matplotlib takes a second that ranks which draw nothing need not spend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(metrics_path(run.run_dir))
    steps = [line for line in lines if line["kind"] == "step"]
    if not steps:
        return
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    kinds = {"spatial": "spatial loss", "summary": "summary loss"}
    for axes, (kind, title) in zip(panels, kinds.items()):
        for name in run.teacher_names:
            points = [(line["step"], line["metrics"].get(f"{name}.{kind}")) for line in steps]
            points = [(step, value) for step, value in points if value is not None and value == value]
            if points:
                axes.plot(*zip(*points), lw=1, label=name)
        axes.set(title=title, xlabel="step")
        axes.legend(frameon=False)
    panels[2].plot([line["step"] for line in steps], [line["metrics"]["loss"] for line in steps], lw=1, color="black", label="training")
    for source in run.validation.sources:
        points = [(line["step"], line["losses"][source]) for line in lines if line["kind"] == "validation" and source in line["losses"]]
        if points:
            panels[2].plot(*zip(*points), "o-", ms=3, label=source)
    panels[2].set(title="total, with weights", xlabel="step")
    panels[2].legend(frameon=False)
    for axes in panels:
        axes.grid(alpha=0.3)
        for boundary in run.first_steps[1:-1]:
            axes.axvline(boundary, color="gray", lw=0.8, ls=":")
    figure.savefig(picture, dpi=120)
