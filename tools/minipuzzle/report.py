"""Stage 5: the page that a person looks at, ``report.html`` with its pictures beside it, from the files of the other stages."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.layout.pattern import ATTENTION, KIND_NAMES, MAMBA, MLP
from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.parent import Parent
from tools.minipuzzle.prediction import Prediction, compare_predictions, describe_predictions
from tools.minipuzzle.rank import Listed, find_candidate, load_candidates, scores_for
from tools.minipuzzle.results import Result, ResultKind, Results, current_results, summarise
from tools.minipuzzle.scores import SYNTHETIC, Scores

_COLORS = {MAMBA: "tab:blue", ATTENTION: "tab:red", MLP: "tab:green"}
_DROPPED = "#e6e6e6"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100%; display: block; margin: 0.5em 0 1.5em }
table { border-collapse: collapse; margin: 0.5em 0 1.5em } th, td { padding: 0.2em 0.8em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } caption, p.note { text-align: left; color: #666 } code { font-size: 0.9em }
"""


def write_report(parent: Parent) -> list[str]:
    """Draw what there is so far; return the findings in sentences, and last the page's path.

    Raises:
        ValueError: there are no candidates yet.
    """
    files = WorkFiles(parent.config.work_dir)
    scores, listed, results = scores_for(parent, files), load_candidates(parent), current_results(parent)
    pictures = files.work_dir / "report"
    pictures.mkdir(parents=True, exist_ok=True)
    best = [each for each in listed if each.chosen] or listed[:3]
    shown = [*best, *(each for each in listed if each.is_exact and each not in best)]
    body = [f"<h1>{html.escape(parent.config.parent)}</h1>"]
    if scores.checkpoint == SYNTHETIC:
        body.append('<p class="note">No weights, no scores: the importance is made up. Counts, patterns and memory are not.</p>')
    winner = find_candidate(listed, results.winner)
    predictions = compare_predictions(parent, results, winner)
    sentences = [*summarise(results), *describe_predictions(predictions, parent.config.search.latency.limit_ms)]
    body += [f"<p><b>{html.escape(sentence)}</b></p>" for sentence in sentences]
    body += _picture(pictures / "importance.png", "Importance of layers", draw_importance(scores))
    body += _picture(pictures / "candidates.png", "Candidates", draw_candidates(listed, parent.config.search.memory.limit_gib))
    body += _picture(pictures / "layers.png", "What is kept", draw_layers(parent.model, shown))
    body.append(_candidate_table(parent.model, shown, results))
    if results.find("long"):
        body += _picture(pictures / "loss.png", "Loss on held-out text", draw_losses(results))
        body.append(_model_table(results))
    if results.speeds:
        body.append(_speed_table(results, predictions))
    page = f'<!doctype html><meta charset="utf-8"><title>MiniPuzzle</title><style>{STYLE}</style>\n' + "\n".join(body) + "\n"
    files.report.write_text(page, encoding="utf-8")
    return [*sentences, str(files.report)]


def draw_importance(scores: Scores) -> Figure:
    """Mean squared change without each layer, by place and kind (the paper's figure 9)."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(scores.kinds))
    for kind in (MAMBA, MLP, ATTENTION):
        of_kind = np.array([its == kind for its in scores.kinds])
        if of_kind.any():
            axes.bar(places[of_kind], scores.layer_mse[of_kind], color=_COLORS[kind], width=0.8, label=KIND_NAMES[kind])
    positive = scores.layer_mse[scores.layer_mse > 0]
    if positive.size:
        axes.set_yscale("log")
        axes.set_ylim(bottom=positive.min() / 2)
    axes.set(xlabel="layer of the parent", ylabel="MSE of the last hidden state\nwithout the layer", xlim=(-0.7, len(places) - 0.3))
    axes.set_xticks(places[:: max(1, len(places) // 24)])
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, ncols=3)
    return figure


def draw_candidates(listed: Sequence[Listed], limit_gib: float | None) -> Figure:
    """All candidates by memory, against what is known of them (the paper's figure 10)."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    ranked = [each for each in listed if each.loss is not None]
    panels: list[tuple[str, str, list[Listed]]] = [("damage", "estimated damage", list(listed))]
    if ranked:
        panels += [("accuracy", "next-token accuracy, not distilled", ranked), ("agreement", "greedy agreement with the parent", ranked)]
    for place, (name, label, shown) in enumerate(panels, start=1):
        axes: Axes = figure.add_subplot(1, len(panels), place)
        for marks, style in (
            ([each for each in shown if not each.is_exact and not each.chosen], {"c": "tab:gray", "s": 14, "alpha": 0.6, "label": "grid"}),
            ([each for each in shown if each.chosen], {"c": "tab:orange", "s": 60, "label": "chosen"}),
            ([each for each in shown if each.is_exact], {"c": "tab:purple", "s": 70, "marker": "*", "label": "exact optimum"}),
        ):
            if marks:
                axes.scatter([each.memory_gib for each in marks], [getattr(each, name) for each in marks], **style)
        if limit_gib is not None:
            axes.axvline(limit_gib, color="black", lw=1, ls="--")
        axes.set(xlabel="memory (GiB)", ylabel=label)
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.tick_params(axis="x", labelrotation=30)
        axes.grid(alpha=0.3)
        if place == 1:
            axes.legend(loc="upper right")
    return figure


def draw_layers(parent: ModelConfig, shown: Sequence[Listed]) -> Figure:
    """Which of the parent's layers each candidate keeps, and how wide its MLP layers are (the paper's figure 11)."""
    rows = len(shown) + 1
    figure = Figure(figsize=(10, 0.9 + 0.42 * rows), layout="constrained")
    axes = figure.add_subplot()
    for layer, kind in enumerate(parent.layer_kinds):
        axes.add_patch(_cell(layer, 0, 1.0, _COLORS[kind]))
    for row, each in enumerate(shown, start=1):
        widths = iter(each.candidate.ffn_hidden_sizes)
        kept = set(each.candidate.layers)
        for layer, kind in enumerate(parent.layer_kinds):
            axes.add_patch(_cell(layer, row, 1.0, _DROPPED))
            if layer in kept:
                share = next(widths) / parent.ffn_hidden_size if kind == MLP else 1.0
                axes.add_patch(_cell(layer, row, share, _COLORS[kind]))
    names = [f"{each.candidate.name}{' (exact)' if each.is_exact else ''}" for each in shown]
    axes.set_yticks(range(rows), ["parent", *names])
    axes.set(xlim=(-0.6, parent.num_layers - 0.4), ylim=(rows - 0.45, -0.55), xlabel="layer of the parent; a lower block is a narrower MLP")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    handles = [Patch(color=color, label=KIND_NAMES[kind]) for kind, color in _COLORS.items()] + [Patch(color=_DROPPED, label="dropped")]
    figure.legend(handles=handles, frameon=False, ncols=4, loc="outside upper right")
    return figure


def draw_losses(results: Results) -> Figure:
    """The winner before and after, beside its parent and the baselines."""
    named = [
        ("parent", results.find("parent"), "tab:gray"),
        ("pruned", results.find("pruned", results.winner), _DROPPED),
        ("distilled", results.find("long", results.winner), "tab:green"),
        ("fine-tuned,\nno teacher", results.find("finetune", results.winner), "tab:blue"),
        ("from scratch", results.find("scratch", results.winner), "tab:red"),
    ]
    there = [(name, result, color) for name, result, color in named if result is not None]
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.bar(
        [name for name, _, _ in there], [result.loss for _, result, _ in there], color=[color for _, _, color in there], width=0.6
    )
    axes.bar_label(bars, [f"{result.loss:.3f}" for _, result, _ in there], padding=2)
    losses = [result.loss for _, result, _ in there]
    margin = max(max(losses) - min(losses), 1e-3)
    axes.set_ylim(min(losses) - 0.35 * margin, max(losses) + 0.15 * margin)
    axes.axhline(losses[0], color="tab:gray", lw=1, ls="--")
    axes.set_ylabel("loss per token (nats); axis cut off")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _cell(column: int, row: int, height: float, color: str) -> Patch:
    from matplotlib.patches import Rectangle

    tall = 0.7 * height
    return Rectangle((column - 0.42, row + 0.35 - tall), 0.84, tall, facecolor=color, linewidth=0)


def _picture(file: Path, title: str, figure: Figure) -> list[str]:
    FigureCanvasAgg(figure)
    figure.savefig(file, dpi=130)
    return [f"<h2>{title}</h2>", f'<img src="{file.parent.name}/{file.name}" alt="{title}">']


def _candidate_table(parent: ModelConfig, shown: Sequence[Listed], results: Results) -> str:
    """Before and after the short distillation (the paper's table 6)."""
    head = ["candidate", "", "GiB", "ms", "damage", "loss before", "accuracy before", "loss after", "accuracy after"]
    rows = []
    for each in shown:
        before, after = results.find("pruned", each.candidate.name), results.find("short", each.candidate.name)
        mark = " (winner)" if each.candidate.name == results.winner else ""
        rows.append(
            [
                each.candidate.name + mark,
                each.candidate.describe(parent),
                f"{each.memory_gib:.4f}",
                "" if each.latency_ms is None else f"{each.latency_ms:.3f}",
                f"{each.damage:.4f}",
                *_quality(before),
                *_quality(after),
            ]
        )
    return html_table("Candidates before and after the short distillation", head, rows)


def _model_table(results: Results) -> str:
    head = ["model", "candidate", "parameters", "tokens", "loss", "accuracy", "agrees with the parent"]
    rows = [
        [
            each.kind,
            each.name,
            f"{each.num_parameters:,}",
            f"{each.tokens:,}",
            *_quality(each),
            "" if each.agreement is None else f"{each.agreement:.2%}",
        ]
        for each in results.models
    ]
    return html_table("All models on held-out text", head, rows)


def _speed_table(results: Results, predictions: Mapping[ResultKind, Prediction]) -> str:
    head = [
        "model",
        "device",
        "precision",
        "context",
        "batch",
        "ms per step",
        "ms predicted",
        "tokens/s",
        "weights and caches, GiB",
        "peak, GiB",
    ]
    rows = [
        [
            {"long": "child"}.get(each.kind, each.kind),
            each.device,
            each.precision,
            f"{each.context_tokens:,}",
            str(each.batch_size),
            f"{each.decode_ms:.3f}",
            f"{predictions[each.kind].predicted_ms:.3f}" if each.kind in predictions else "",
            f"{each.tokens_per_s:,.1f}",
            f"{each.memory_gib:.3f}",
            "" if each.peak_gib is None else f"{each.peak_gib:.3f}",
        ]
        for each in results.speeds
    ]
    return html_table("Decoding on this device, one rank, caches full", head, rows)


def _quality(result: Result | None) -> list[str]:
    return ["", ""] if result is None else [f"{result.loss:.4f}", f"{result.accuracy:.2%}"]


def html_table(caption: str, head: list[str], rows: list[list[str]]) -> str:
    """A table of text cells."""
    cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    header = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table><caption>{caption}</caption><tr>{header}</tr>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"
