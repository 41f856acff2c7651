"""Several compressions beside each other, the same but for their seeds: how much of what pruning cost came back, mean and deviation."""

from __future__ import annotations

import html
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.report import STYLE, html_table
from tools.minipuzzle.results import LEAST_COST, Result, ResultKind, Results, costs_nothing, load_results
from tools.minipuzzle.scores import load_scores

TRAINED: dict[ResultKind, str] = {"long": "distilled", "finetune": "fine-tuned without a teacher", "scratch": "from scratch"}
"""The trainings that are compared, on as many tokens each, and what people call them."""
_COLORS: dict[ResultKind, str] = {"long": "tab:green", "finetune": "tab:blue", "scratch": "tab:red"}

_LOWEST_SHOWN, _HIGHEST_SHOWN = -1.0, 1.2
"""Where the picture of the shares ends: as much again lost as pruning cost, and a little more than all of it won back."""


@dataclass(frozen=True)
class Spread:
    """A figure over several compressions."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Their standard deviation (of a sample, n - 1); None of one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def describe(self, digits: int = 4, factor: float = 1.0, unit: str = "") -> str:
        """For a table.

        >>> Spread((1.0, 2.0, 3.0)).describe(2), Spread((0.5,)).describe(1, 100, " %")
        ('2.00 +- 1.00', '50.0 %')
        """
        spread = "" if self.deviation is None else f" +- {factor * self.deviation:.{digits}f}"
        return f"{factor * self.mean:.{digits}f}{spread}{unit}"


@dataclass(frozen=True)
class Comparison:
    """What compressions of one parent came to, in the order of ``work_dirs``."""

    work_dirs: tuple[Path, ...]
    results: tuple[Results, ...]

    @property
    def kinds(self) -> list[ResultKind]:
        """The trainings that all of them have."""
        return [kind for kind in TRAINED if all(each.find(kind, each.winner) for each in self.results)]

    def of(self, kind: ResultKind) -> list[Result]:
        """The parents, or the winners after one kind of training."""
        return [each.find(kind, None if kind == "parent" else each.winner) for each in self.results]

    def losses(self, kind: ResultKind) -> Spread:
        """Loss on held-out text, nats per token."""
        return Spread(tuple(result.loss for result in self.of(kind)))

    def accuracies(self, kind: ResultKind) -> Spread:
        """Next-token accuracy."""
        return Spread(tuple(result.accuracy for result in self.of(kind)))

    def recovered(self, kind: ResultKind) -> Spread | None:
        """Share of the loss that pruning cost which a training won back; below 0 where it lost more.

        Over the compressions where pruning cost something measurable; None where there is none.
        """
        values = tuple(share for share in (each.recovered(kind) for each in self.results) if share is not None)
        return Spread(values) if values else None

    def parameter_shares(self) -> Spread:
        """The winners' parameters over the parent's."""
        pairs = zip(self.of("long"), self.of("parent"), strict=True)
        return Spread(tuple(child.num_parameters / parent.num_parameters for child, parent in pairs))

    def speedup(self) -> Spread | None:
        """Decoding throughput of child over parent; None where not all were timed."""
        if not all(each.speeds for each in self.results):
            return None
        return Spread(tuple(after.tokens_per_s / before.tokens_per_s for before, after in (each.speeds for each in self.results)))


def compare(work_dirs: Sequence[Path]) -> Comparison:
    """Read the results of finished compressions.

    Raises:
        ValueError: one has no distilled winner yet, or they are not of one parent's weights.
    """
    results = tuple(load_results(WorkFiles(work_dir)) for work_dir in work_dirs)
    for work_dir, each in zip(work_dirs, results, strict=True):
        if each.winner is None or each.cost_of_pruning() is None or not each.find("long", each.winner):
            raise ValueError(f"{work_dir} has no distilled winner yet; run its compression to the end first")
    parents = {work_dir: load_scores(WorkFiles(work_dir).scores).checkpoint for work_dir in work_dirs}
    if len(set(parents.values())) > 1:
        named = ", ".join(f"{work_dir} compressed weights {digest}" for work_dir, digest in parents.items())
        raise ValueError(f"only compressions of one parent can be compared; {named}: leave out those of the others")
    return Comparison(tuple(work_dirs), results)


def comparison_table(comparison: Comparison) -> str:
    """The table for a terminal, with what else there is to say below it."""
    table = _rows(comparison)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
    return "\n".join([*lines, *_notes(comparison)])


def write_comparison(comparison: Comparison, directory: Path) -> Path:
    """Write ``comparison.png`` and ``comparison.html`` and return the page's path."""
    directory.mkdir(parents=True, exist_ok=True)
    figure = draw_comparison(comparison)
    FigureCanvasAgg(figure)
    figure.savefig(directory / "comparison.png", dpi=130)
    head, *rows = _rows(comparison)
    body = [
        "<h1>Compressions that differ in their seed</h1>",
        *(f"<p><b>{html.escape(note)}</b></p>" for note in _notes(comparison)),
        '<img src="comparison.png" alt="Loss and recovered share by training">',
        html_table(f"Mean and standard deviation of {len(comparison.results)} seeds, on held-out text", head, rows),
        "<p>" + ", ".join(html.escape(str(work_dir)) for work_dir in comparison.work_dirs) + "</p>",
    ]
    page = directory / "comparison.html"
    head_tags = f'<!doctype html><meta charset="utf-8"><title>MiniPuzzle</title><style>{STYLE}</style>\n'
    page.write_text(head_tags + "\n".join(body) + "\n", encoding="utf-8")
    return page


def draw_comparison(comparison: Comparison) -> Figure:
    """Left the losses, right the shares won back: a bar for the mean, a dot for every seed."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    trained = [(kind, textwrap.fill(TRAINED[kind], 12), _COLORS[kind]) for kind in comparison.kinds]
    losses = [(name, comparison.losses(kind), color) for kind, name, color in trained]
    losses = [
        ("parent", comparison.losses("parent"), "tab:gray"),
        ("pruned", comparison.losses("pruned"), "lightgray"),
        *losses,
    ]
    shares = [(name, share, color) for kind, name, color in trained if (share := comparison.recovered(kind)) is not None]
    for axes, shown in ((left, losses), (right, shares)):
        for place, (_, spread, color) in enumerate(shown):
            axes.bar(place, spread.mean, color=color, width=0.6)
            axes.scatter([place] * len(spread.values), spread.values, color="black", s=14, zorder=3)
        axes.set_xticks(range(len(shown)), [name for name, _, _ in shown])
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    values = [value for _, spread, _ in losses for value in spread.values]
    margin = max(max(values) - min(values), 1e-3)
    left.set_ylim(min(values) - 0.3 * margin, max(values) + 0.1 * margin)
    left.axhline(comparison.losses("parent").mean, color="tab:gray", lw=1, ls="--")
    left.set_ylabel("loss per token (nats); axis cut off")
    right.set_ylabel("share of the lost loss won back")
    if not shares:
        right.set(xticks=[], yticks=[])
        right.text(0.5, 0.5, "pruning cost nothing measurable", ha="center", va="center", transform=right.transAxes)
        return figure
    right.axhline(0.0, color="black", lw=0.8)
    right.axhline(1.0, color="tab:gray", lw=1, ls="--")
    # What lost more than pruning did is far below, and would flatten the rest: cut off there, said in its label.
    lowest = min(value for _, spread, _ in shares for value in spread.values)
    right.set_ylim(bottom=max(min(lowest, 0.0) * 1.1, _LOWEST_SHOWN), top=_HIGHEST_SHOWN)
    for place, (_, spread, _) in enumerate(shares):
        right.text(
            place, min(max(*spread.values, 0.0) + 0.04, _HIGHEST_SHOWN - 0.1), spread.describe(0, 100, " %"), ha="center", va="bottom"
        )
    return figure


def _rows(comparison: Comparison) -> list[list[str]]:
    rows = [["model", "loss", "accuracy", "won back", "by each seed"]]
    names: dict[ResultKind, str] = {"parent": "parent", "pruned": "pruned", **{kind: TRAINED[kind] for kind in comparison.kinds}}
    for kind, name in names.items():
        row = [name, comparison.losses(kind).describe(), comparison.accuracies(kind).describe(2, 100, " %")]
        if kind in TRAINED:
            recovered = comparison.recovered(kind)
            each_seed = (each.recovered(kind) for each in comparison.results)
            row += [
                "" if recovered is None else recovered.describe(1, 100, " %"),
                ", ".join("-" if share is None else f"{share:.1%}" for share in each_seed),
            ]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return rows


def _notes(comparison: Comparison) -> list[str]:
    parent_size = comparison.of("parent")[0].num_parameters
    notes = [f"parameters: {comparison.parameter_shares().describe(1, 100, ' %')} of the parent's {parent_size:,}"]
    for work_dir, each in zip(comparison.work_dirs, comparison.results, strict=True):
        if each.cost_of_pruning() < LEAST_COST:
            notes.append(f"{work_dir} has no share that was won back: {costs_nothing(each)}")
    speedup = comparison.speedup()
    if speedup is not None:
        before = comparison.results[0].speeds[0]
        notes.append(
            f"decoding at {before.context_tokens:,} tokens of context, batch {before.batch_size}, {before.device} ({before.precision}): "
            f"{speedup.describe(3)} times the parent's {before.tokens_per_s:,.1f} tokens/s"
        )
    return notes
