"""How far float8 is from the run's own precision over a whole training: the same model, seed and data, trained once each way.

    python -m benchmarks.fp8_loss_gap --option model.mamba_num_heads=16 --option model.mamba_head_dim=24 --option train.steps=400
    python -m benchmarks.fp8_loss_gap examples/minipuzzle/gpu_parent.yaml --option model.mamba_num_heads=32      # on a GPU

A fourth training is without float8 again, with micro-batches half as large: the same sums rounded otherwise, as near as two trainings get.
The heads are such that in_proj's rows are a multiple of 16, as float8 wants them. The text is Python, whatever the run says, kept in
--directory beside the trainings; what is there already goes on or is not repeated.
The gap is (without - other) / without, averaged over --window steps: negative where the other is worse, as in Nemotron-H's figures 5 and 6.
Prints a table and writes loss_gap.png beside the run directories.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.options import not_negative, positive
from benchmarks.python_text import prepare_text
from examples.quickstart.demo import run
from megatron_hybrid.config import ConfigError, RunConfig, load_config
from megatron_hybrid.train.callbacks.float8 import describe_float8
from megatron_hybrid.train.callbacks.metrics_file import metrics_path, read_metrics

BASELINE, CONTROL = "without float8", "without, rounded otherwise"
FLOAT8 = {"float8, delayed scaling": "delayed", "float8, current scaling": "current"}


@dataclass(frozen=True)
class Losses:
    """One training's."""

    training: np.ndarray
    """[steps] of every step's batch, before its update."""
    validation: float
    """Of the last validation, averaged over its sources."""


@dataclass(frozen=True)
class Gap:
    """One training beside the baseline, in shares of the baseline's loss."""

    windows: np.ndarray
    """[windows] mean gap over consecutive steps."""
    last_tenth: float
    """Mean gap over the last tenth of the steps."""
    validation: float


def gap_to(baseline: Losses, other: Losses, window: int) -> Gap:
    """Return the gap of ``other``; steps after the last whole window enter no window.

    Raises:
        ValueError: the trainings differ in length, or are shorter than a window.
    """
    if baseline.training.shape != other.training.shape or len(baseline.training) < window:
        lengths = f"{len(baseline.training)} and {len(other.training)} steps"
        raise ValueError(
            f"trainings of {lengths} cannot be compared over windows of {window}; train both as long, or give a smaller --window"
        )
    shares = (baseline.training - other.training) / baseline.training
    num_windows = len(shares) // window
    return Gap(
        windows=shares[: num_windows * window].reshape(num_windows, window).mean(1),
        last_tenth=float(shares[-max(1, len(shares) // 10) :].mean()),
        validation=(baseline.validation - other.validation) / baseline.validation,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not trained yet and compare; returns the exit code of the first training that fails."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fp8_loss_gap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="examples/quickstart/config.yaml", help="the run (default: %(default)s)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="option of all four trainings")
    parser.add_argument("--bf16-layers", type=not_negative, default=2, help="layers kept out of float8 at each end (default: %(default)s)")
    parser.add_argument("--window", type=positive, default=20, help="steps that a point of the curve averages (default: %(default)s)")
    parser.add_argument("--text-mb", type=float, default=128.0, help="Python text to learn from, in MB (default: 128)")
    parser.add_argument("--directory", type=Path, default=Path("runs/fp8_loss_gap"), help="for the trainings (default: %(default)s)")
    arguments = parser.parse_args(argv)
    text = arguments.directory / "text"
    own = [f"data.tokenizer.path={text / 'tokenizer.model'}", f"data.sources={{python: {text / 'python'}}}"]
    options = [*arguments.option, *own, f"validation.sources={{python: {text / 'python.holdout'}}}"]
    try:
        config = load_config(arguments.config, options)
        trainings = {name: [*options, *of_it] for name, of_it in variants(config, arguments.bf16_layers).items()}
        runs = {name: load_config(arguments.config, of_it) for name, of_it in trainings.items()}
    except ConfigError as error:
        parser.error(str(error))
    if arguments.window > config.train.steps:
        parser.error(f"--window {arguments.window} is longer than the training of {config.train.steps} steps; give a smaller one")
    code = prepare_text(text / "tokenizer.model", text / "python", config.model.vocab_size, arguments.text_mb)
    for name, of_it in trainings.items():
        run_dir = f"run_dir={run_directory(arguments.directory, name)}"
        code = code or run("megatron_hybrid", "pretrain", arguments.config, *of_it, run_dir)
    if code:
        return code
    losses = {name: read_losses(run_directory(arguments.directory, name)) for name in trainings}
    gaps = {name: gap_to(losses[BASELINE], each, arguments.window) for name, each in losses.items() if name != BASELINE}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    which = [line for name in FLOAT8 for line in describe_float8(runs[name], device)]
    print("\n".join(["", *which, "", describe(losses, gaps)]))
    picture = arguments.directory / "loss_gap.png"
    figure = draw(losses[BASELINE], gaps, arguments.window)
    FigureCanvasAgg(figure)
    figure.savefig(picture, dpi=130)
    print(f"\n{picture}")
    return 0


def variants(config: RunConfig, bf16_layers: int) -> dict[str, list[str]]:
    """What each training is called -> its own options.

    Raises:
        ConfigError: the micro-batches cannot be halved.
    """
    if config.train.micro_batch_size % 2:
        raise ConfigError(f"train.micro_batch_size={config.train.micro_batch_size}: expected an even one, which the control halves")
    ends = [f"fp8.bf16_layers_at_start={bf16_layers}", f"fp8.bf16_layers_at_end={bf16_layers}"]
    options: dict[str, list[str]] = {BASELINE: [], CONTROL: [f"train.micro_batch_size={config.train.micro_batch_size // 2}"]}
    options |= {name: [f"fp8.recipe={recipe}", *ends] for name, recipe in FLOAT8.items()}
    return options


def run_directory(directory: Path, name: str) -> Path:
    """Where a training is kept."""
    return directory / name.replace(", ", "_").replace(" ", "_").lower()


def read_losses(run_dir: Path) -> Losses:
    """Return a finished training's losses."""
    lines = read_metrics(metrics_path(run_dir))
    training = np.array([line["metrics"]["loss"] for line in lines if line["kind"] == "step"])
    last = [line["losses"] for line in lines if line["kind"] == "validation"][-1]
    return Losses(training, float(np.mean(list(last.values()))))


def describe(losses: dict[str, Losses], gaps: dict[str, Gap]) -> str:
    """The table, a line for each training."""
    lines = [f"{'training':26} {'last tenth':>10} {'validation':>10} {'gap, last tenth':>16} {'validation gap':>15} {'widest window':>14}"]
    for name, each in losses.items():
        tail = float(each.training[-max(1, len(each.training) // 10) :].mean())
        line = f"{name:26} {tail:10.4f} {each.validation:10.4f}"
        if name in gaps:
            gap = gaps[name]
            widest = gap.windows[np.abs(gap.windows).argmax()]
            line += f" {gap.last_tenth:16.3%} {gap.validation:15.3%} {widest:14.3%}"
        lines.append(line)
    return "\n".join(lines)


def draw(baseline: Losses, gaps: dict[str, Gap], window: int) -> Figure:
    """The gaps over the steps, and the loss they are shares of."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhspan(-0.1, 0.1, color="0.93", zorder=0, label="within 0.1 %")
    for (name, gap), color in zip(gaps.items(), ("tab:gray", "tab:blue", "tab:orange"), strict=True):
        axes.plot(window * (np.arange(len(gap.windows)) + 0.5), 100 * gap.windows, color=color, lw=1.5, label=name)
    axes.axhline(0.0, color="black", lw=0.8)
    axes.set(xlabel=f"step (means of {window})", ylabel="loss gap (%), below 0: worse than without float8")
    axes.legend(frameon=False, loc="lower left")
    loss_axes = axes.twinx()
    loss_axes.plot(np.arange(len(baseline.training)), baseline.training, color="tab:green", lw=0.6, alpha=0.5)
    loss_axes.set_ylabel("loss without float8 (nats)", color="tab:green")
    return figure


if __name__ == "__main__":
    sys.exit(main())
