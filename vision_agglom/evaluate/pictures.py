"""features.png and evaluation.png: what a person looks at after an evaluation."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from vision_agglom.evaluate.pca import pca_colours
from vision_agglom.evaluate.report import Report, Shown


def draw_features(shown: Shown, picture: Path) -> None:
    """Images beside the student's own patches and, per teacher, the teacher's features and the head's, in one set of colours for both."""
    columns: list[tuple[str, Tensor]] = [
        ("image", shown.images_BCHW.permute(0, 2, 3, 1).cpu()),
        ("student", pca_colours(shown.backbone[0].cpu(), shown.backbone[1])),
    ]
    for name, teacher in shown.teachers.items():
        head = shown.heads[name]
        theirs, ours = _same_colours(teacher.spatial_BTC.float().cpu(), teacher.grid, head.spatial_BTC.float().cpu(), head.grid)
        columns += [(name, theirs), (f"student as {name}", ours)]
    rows = len(shown.images_BCHW)
    figure = Figure(figsize=(1.9 * len(columns), 1.95 * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns):
        panels[0][column].set_title(title, fontsize=10)
        for row in range(rows):
            panels[row][column].imshow(pictures[row].numpy(), interpolation="nearest")
            panels[row][column].set_axis_off()
    figure.savefig(picture, dpi=110)


def draw_curves(report: Report, picture: Path) -> None:
    """Fidelity and cosine error to each teacher, and the scale-equivariance error, over resolution: a mode switch shows as a step."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    fidelity, cosine, equivariance = figure.subplots(1, 3)
    for name, by_side in report.curves.items():
        sides = list(by_side)
        fidelity.plot(sides, [by_side[side]["fidelity"] for side in sides], "o-", ms=3, label=name)
        cosine.plot(sides, [by_side[side]["cosine_error"] for side in sides], "o-", ms=3, label=name)
    fidelity.axhline(1.0, color="gray", lw=0.8, ls=":")
    equivariance.plot(list(report.equivariance), list(report.equivariance.values()), "o-", ms=3, color="black")
    equivariance.plot([report.resolution], [0.0], "k*", label="reference")
    for axes, title in (
        (fidelity, "fidelity (1: the teacher's mean)"),
        (cosine, "cosine error"),
        (equivariance, "scale-equivariance error"),
    ):
        _finish(axes, title)
    figure.savefig(picture, dpi=120)


def _finish(axes: Axes, title: str) -> None:
    axes.set(title=title, xlabel="side of the image in pixels", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _same_colours(
    first_BTC: Tensor, first_grid: tuple[int, int], second_BTC: Tensor, second_grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Colours of two networks' features of the same space along the same axes."""
    batch, channels = len(first_BTC), first_BTC.shape[-1]
    rows = torch.cat([first_BTC.flatten(0, 1), second_BTC.flatten(0, 1)])
    colours = pca_colours(rows.view(1, -1, channels), (len(rows), 1))[0, :, 0]
    first, second = colours.split([batch * first_BTC.shape[1], batch * second_BTC.shape[1]])
    return first.view(batch, *first_grid, 3), second.view(batch, *second_grid, 3)
