"""Cost of a fixed-resolution teacher per image: one image resized to its square per pass, against a k x k mosaic.

    python -m benchmarks.mosaic [--size huge] [--sides 256 432] [--images 32] [--device cuda] [--dtype bf16] [--picture mosaic.png]

The teacher is a SAM image encoder of transformers with random weights (its cost does not depend on them). Both ways see the same images
and give features on the grid of the student's patches; the ratio is the cost saved. Slices have as many canvases either way. Under a minute
on one GPU. On a CPU use --size tiny --images 16 --dtype fp32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.options import device, picture, positive
from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.images.mosaic import MosaicTeacher
from vision_agglom.teachers import load_teacher

SIZES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_dim": 256, "global_attn_indexes": [3]},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_dim": 3072, "global_attn_indexes": [2, 5, 8, 11]},
    "huge": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "mlp_dim": 5120,
        "global_attn_indexes": [7, 15, 23, 31],
    },
}


def measure(run: Callable[[], object], place: torch.device, repetitions: int) -> float:
    """Return the best of the repetitions, in seconds, after one to warm up."""
    best = float("inf")
    for number in range(repetitions + 1):
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        start = time.perf_counter()
        run()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        if number:
            best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    """Print one line per image side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="huge", help="of the SAM encoder (default: %(default)s)")
    parser.add_argument("--sides", type=positive, nargs="+", default=[256, 432], help="of the images (default: %(default)s)")
    parser.add_argument("--images", type=positive, default=32, help="images per measurement (default: %(default)s)")
    parser.add_argument("--slice-size", type=positive, default=2, help="canvases per forward pass (default: %(default)s)")
    parser.add_argument("--repetitions", type=positive, default=3, help="default: %(default)s")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="default: %(default)s")
    parser.add_argument("--picture", type=picture, help="PNG to draw; none unless given")
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    spec = TeacherConfig(
        name="sam",
        library="transformers",
        model="sam",
        pretrained=False,
        options=SIZES[arguments.size],
        resize_input=True,
        slice_size=arguments.slice_size,
    )
    with arguments.device:
        # Random weights are drawn where they will run.
        teacher = load_teacher(spec, arguments.device, dtype)
    try:
        mosaics = [MosaicTeacher(teacher, side, teacher.mean_C) for side in arguments.sides]
    except ValueError as error:
        parser.error(str(error))
    bars: dict[str, tuple[float, float]] = {}
    print(f"{'side':>5} {'mosaic':>7} {'plain ms/image':>15} {'mosaic ms/image':>16} {'saved':>7}", flush=True)
    for side, mosaic in zip(arguments.sides, mosaics, strict=True):
        images = torch.rand(arguments.images, 3, side, side, device=arguments.device)
        plain_s, mosaic_s = (
            measure(lambda images=images, way=way: way(images), arguments.device, arguments.repetitions) / arguments.images
            for way in (teacher, mosaic)
        )
        layout = f"{mosaic.plan.per_side} x {mosaic.plan.per_side}"
        print(f"{side:5} {layout:>7} {plain_s * 1e3:15.2f} {mosaic_s * 1e3:16.2f} {plain_s / mosaic_s:6.1f}x", flush=True)
        bars[f"{side} px, {layout}"] = (plain_s * 1e3, mosaic_s * 1e3)
    if arguments.picture is not None:
        draw(bars, f"SAM, {arguments.size}, {arguments.dtype}, on {arguments.device.type}", arguments.picture)


def draw(bars: dict[str, tuple[float, float]], title: str, path: Path) -> None:
    """Milliseconds per image, both ways, side by side."""
    figure = Figure(figsize=(1.5 + 2 * len(bars), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for offset, label, values in zip((-0.2, 0.2), ("one image per square", "mosaic"), zip(*bars.values(), strict=True), strict=True):
        axes.bar_label(axes.bar([place + offset for place in range(len(bars))], values, 0.4, label=label), fmt="%.1f")
    axes.set_xticks(range(len(bars)), bars)
    axes.set(title=title, ylabel="ms per image")
    axes.margins(y=0.1)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
