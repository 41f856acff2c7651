"""loss.png: the run at a glance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hybrid.config import RunConfig
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.train.callback import Callback
from megatron_hybrid.train.callbacks.metrics_file import metrics_path, read_metrics

if TYPE_CHECKING:
    from megatron_hybrid.train.trainer import Trainer


class LossCurve(Callback):
    """Draws RUN_DIR/loss.png when the process ends, from metrics.jsonl, so that a resumed run shows all of itself."""

    def __init__(self, run: RunConfig) -> None:
        self.run_dir = run.run_dir

    def on_end(self, trainer: Trainer, exit_code: ExitCode) -> None:
        draw_loss_curve(self.run_dir, self.run_dir / "loss.png")


def draw_loss_curve(run_dir: Path, picture: Path) -> None:
    """Plot training loss, validation losses and learning rate over tokens."""
    # Imported here: matplotlib takes a second that ranks which draw nothing need not spend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    lines = read_metrics(metrics_path(run_dir))
    steps = [line for line in lines if line["kind"] == "step"]
    if not steps:
        return
    tokens = [line["tokens"] for line in steps]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(tokens, [line["metrics"]["loss"] for line in steps], color="tab:blue", alpha=0.5, lw=0.8, label="training")
    tokens_at = dict(zip((line["step"] for line in steps), tokens, strict=True))
    validations = [line for line in lines if line["kind"] == "validation"]
    for number, source in enumerate(sorted({source for line in validations for source in line["losses"]}), start=1):
        points = [(tokens_at[line["step"]], line["losses"][source]) for line in validations if source in line["losses"]]
        axes.plot(*zip(*points, strict=True), "o-", ms=4, color=f"C{number}", label=f"validation: {source}")
    axes.set(xlabel="tokens", ylabel="loss per token (nats)", title=str(run_dir))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    rates = axes.twinx()
    rates.plot(tokens, [line["learning_rate"] for line in steps], color="tab:gray", lw=1, ls=":", label="learning rate")
    rates.set_ylabel("learning rate")
    handles = [*axes.get_lines(), *rates.get_lines()]
    axes.legend(handles, [handle.get_label() for handle in handles], frameon=False)
    figure.savefig(picture, dpi=120)
