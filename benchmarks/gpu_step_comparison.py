"""What two runs of `gpu_step.py` say of each other, and what a row of them over the sequence length says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Reports = Mapping[tuple[str, int], Mapping[str, Any] | None]
"""System and sequence length -> its report; None where the run failed."""


@dataclass(frozen=True)
class LossBound:
    """How far the losses of two systems may lie apart: at first by rounding alone, later by what training makes of it.

    The steps learn the same random tokens by heart, so that a loss falls from 12 to below 1 in eight steps, by up to 1.7 a step, and a
    small difference in pace is a large one in the loss.
    """

    num_first_steps: int
    first: float
    later: float


LOSS_BOUNDS = {
    # Two systems on an H200 lay within 9e-4 of each other in four steps and within 2.8e-2 in eight (docs/cards/gpu_step.md).
    "bf16": LossBound(num_first_steps=4, first=2e-3, later=0.06),
    # Ours rolls its histories once a step, Transformer Engine once a micro-batch; so the first step alone has the same scales. The losses
    # of no pair are known yet: against BF16 ours lay within 3e-3 in the first step and within 0.37 in eight.
    "delayed": LossBound(num_first_steps=1, first=1e-2, later=0.4),
    "current": LossBound(num_first_steps=1, first=1e-2, later=0.4),
}


def compare(base: Mapping[str, Any], other: Mapping[str, Any], *, precision: str) -> dict[str, Any]:
    """How much faster ``other`` is than ``base``, in which part of its memory, and whether their losses agree.

    Args:
        base, other: reports of `gpu_step_systems.measure`, over the same number of steps.
        precision: of both: a key of ``LOSS_BOUNDS``.

    Returns:
        ratio: of tokens per second; memory: of peak memory; largest_loss_difference; step_of_it, from 1; loss_bound: at that step;
        losses_agree: whether every step's difference is within its bound. A loss that is not a number agrees with nothing.

    Raises:
        ValueError: the runs are of different length.
    """
    if len(base["losses"]) != len(other["losses"]) or not base["losses"]:
        raise ValueError(f"losses of {len(base['losses'])} and {len(other['losses'])} steps have nothing to compare; run as many of both")
    bound = LOSS_BOUNDS[precision]
    bounds = [bound.first if index < bound.num_first_steps else bound.later for index in range(len(base["losses"]))]
    differences = [abs(theirs - ours) for theirs, ours in zip(base["losses"], other["losses"], strict=True)]
    # The step to name is the one furthest beyond its bound; NaN compares with nothing and comes first.
    shares = [float("inf") if difference != difference else difference / most for difference, most in zip(differences, bounds, strict=True)]
    worst = shares.index(max(shares))
    return {
        "ratio": round(other["tokens_per_s"] / base["tokens_per_s"], 3),
        "memory": round(other["peak_gib"] / base["peak_gib"], 3),
        "largest_loss_difference": round(differences[worst], 4),
        "step_of_it": worst + 1,
        "loss_bound": bounds[worst],
        "losses_agree": shares[worst] <= 1,
    }


def length_table(reports: Reports) -> str:
    """One aligned line per sequence length and system, with how much faster the second of two systems is than the first."""
    systems = list(dict.fromkeys(system for system, _ in reports))
    lengths = list(dict.fromkeys(length for _, length in reports))
    lines = [f"{'length':>8}  {'system':<6}  {'tokens/s':>9}  {'MFU':>6}  {'peak GiB':>8}  {'s/step':>8}  {'ratio':>6}"]
    for length in lengths:
        first = reports[systems[0], length]
        for system in systems:
            report = reports[system, length]
            if report is None:
                lines.append(f"{length:>8,}  {system:<6}  {'failed':>9}")
                continue
            ratio = f"{report['tokens_per_s'] / first['tokens_per_s']:.3f}" if first and system != systems[0] else ""
            figures = f"{report['tokens_per_s']:>9,}  {report['mfu']:>6.1%}  {report['peak_gib']:>8.2f}  {report['step_s']:>8.4f}"
            lines.append(f"{length:>8,}  {system:<6}  {figures}  {ratio:>6}".rstrip())
    return "\n".join(lines)


def plot_lengths(reports: Reports, path: Path, *, title: str) -> None:
    """Draw tokens per second, MFU and peak memory over the sequence length, a line per system; lengths that failed are left out."""
    from matplotlib.figure import Figure

    panels = {"tokens_per_s": "tokens/s", "mfu": "MFU of 989 TFLOP/s, %", "peak_gib": "peak memory, GiB"}
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.suptitle(title)
    for axes, (key, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for system in dict.fromkeys(system for system, _ in reports):
            points = [(length, report[key]) for (name, length), report in reports.items() if name == system and report is not None]
            factor = 100 if key == "mfu" else 1
            axes.plot([length for length, _ in points], [factor * value for _, value in points], marker="o", label=system)
        ticks = list(dict.fromkeys(length for _, length in reports))
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick // 1024}k" if tick % 1024 == 0 else f"{tick:,}" for tick in ticks])
        axes.set(xlabel="tokens per sequence", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(path, dpi=120)
