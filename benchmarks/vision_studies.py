"""Three studies on the small run of examples/radio: normalisations, resolutions, teachers divided over ranks.

    python -m benchmarks.vision_studies standardizers       7 normalisations x 3 seeds: MSE in the teachers' own spaces, mean rank
    python -m benchmarks.vision_studies resolutions         one resolution against several: fidelity and scale error over resolution
    python -m benchmarks.vision_studies partitions          every rank runs all teachers, or ranks divide them: images/s, 2 ranks
    python -m benchmarks.vision_studies standardizers --seeds 0 --steps 20     a shorter one

Data and steps are the same throughout a study; a seed is that of the weights. Teachers are those of the small run: random weights, three
architectures. Students are measured on tiles of the four photographs that no run is shown. All runs of a study go through one process.
Each leaves its configuration and figures below --output; what is there is kept when the study is started again, so seeds can run side
by side (--seeds 0 & --seeds 1 & ...) and be put together afterwards (--seeds 0 1 2). Prints a table and draws OUTPUT/STUDY.png.
Without --images the images are those of examples/radio/demo.py, made where they are missing (that needs scikit-image and scikit-learn).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.options import not_negative, positive
from examples.radio.demo import make_images
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.substrate.launch import run_on_ranks
from megatron_hybrid.substrate.quiet import silence_known_warnings
from vision_agglom.config.distill import Standardizer
from vision_agglom.config.load import dump_config, load_config
from vision_agglom.config.schema import VisionConfig
from vision_agglom.images.decode import decode_square
from vision_agglom.images.framing import frame_whole
from vision_agglom.images.open_source import open_source
from vision_agglom.images.pack import encode_png, write_shards
from vision_agglom.images.records import Record

if TYPE_CHECKING:
    from megatron_hybrid.substrate.context import Substrate

# megatron-core is imported where it is used, after its known warnings were silenced.
CONFIG = Path(__file__).parents[1] / "examples/radio/photographs.yaml"
TILES_PER_SIDE, TILE = 4, 256
RESULT = "study.json"
"""What a run of a study leaves beside its configuration."""
CURVE_SIDES = (64, 96, 128, 160, 192, 256)
MIXTURES: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "one": lambda batch: [{"resolutions": [128], "batch_size": batch, "micro_batch_size": batch}],
    "several": lambda batch: [
        {"resolutions": [64, 96, 128], "batch_size": batch * 3 // 4, "micro_batch_size": batch * 3 // 4},
        {"resolutions": [192, 256], "batch_size": batch // 4, "micro_batch_size": batch // 4},
    ],
}
"""Images per step alike."""


@dataclass(frozen=True)
class Study:
    """Runs that are compared, and how."""

    runs: Callable[[argparse.Namespace], dict[str, VisionConfig]]
    measure: Callable[[VisionConfig, Substrate], dict[str, Any]]
    """After training; the figures of one run."""
    show: Callable[[dict[str, Any], Path], str]
    """From the figures of all runs to the table; draws the picture."""


def main() -> int:
    """Run one study, print its table and draw its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES), help="what is compared")
    parser.add_argument("--seeds", type=not_negative, nargs="+", default=[0, 1, 2], help="of the weights (default: 0 1 2)")
    parser.add_argument("--steps", type=positive, default=200, help="optimizer steps of each run (default: 200)")
    parser.add_argument("--batch", type=positive, default=16, help="images per step, a multiple of 4 (default: 16)")
    parser.add_argument("--ranks", type=positive, default=2, help="data-parallel ranks of partitions (default: 2)")
    parser.add_argument("--workers", type=not_negative, default=1, help="decoding processes (default: 1)")
    parser.add_argument("--images", type=Path, default=Path("runs/radio/images"), help="made images (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/radio_studies"), help="where the runs go (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.batch % 4 or arguments.batch % arguments.ranks:
        parser.error(f"--batch {arguments.batch} must be a multiple of 4, and of --ranks {arguments.ranks}")
    if arguments.study == "partitions" and arguments.steps < 2:
        parser.error(f"--steps {arguments.steps} must be at least 2 for partitions: the first step warms up and is not timed")
    silence_known_warnings()
    study = STUDIES[arguments.study]
    make_images(arguments.images)
    cut_tiles(arguments.images)
    figures: dict[str, Any] = {}
    runs = study.runs(arguments)
    for run in runs.values():
        result = run.run_dir / RESULT
        if result.exists() and json.loads(result.read_text())["config"] != dump_config(run):
            print(f"error: {run.run_dir} holds a run with other options; name another --output", file=sys.stderr)
            return 2
    todo = [run for run in runs.values() if not (run.run_dir / RESULT).exists()]
    for ranks in sorted({run.parallel.data or 1 for run in todo}):
        own = [run for run in todo if (run.parallel.data or 1) == ranks]
        code = run_on_ranks(Work(own, study.measure), own[0])
        if code:
            return code
    for label, run in runs.items():
        figures[label] = json.loads((run.run_dir / RESULT).read_text())["figures"]
    print(study.show(figures, arguments.output / f"{arguments.study}.png"))
    (arguments.output / f"{arguments.study}.json").write_text(json.dumps(figures, indent=1) + "\n")
    return 0


class Work:
    """What each rank does (picklable): train and measure one run after another."""

    def __init__(self, runs: list[VisionConfig], measure: Callable[[VisionConfig, Substrate], dict[str, Any]]) -> None:
        self.runs, self.measure = runs, measure

    def __call__(self, first: VisionConfig, substrate: Substrate) -> ExitCode:
        """Train and measure all of them."""
        from vision_agglom.train import train

        for number, run in enumerate(self.runs, start=1):
            if substrate.rank == 0:
                print(f"{number}/{len(self.runs)} {run.run_dir}", file=sys.stderr, flush=True)
            with redirect_stdout(StringIO()):
                code = train(run, substrate)
            if code != ExitCode.FINISHED:
                return code
            figures = self.measure(run, substrate)
            if substrate.rank == 0:
                (run.run_dir / RESULT).write_text(json.dumps({"config": dump_config(run), "figures": figures}, indent=1) + "\n")
        return ExitCode.FINISHED


def evaluate(run: VisionConfig, substrate: Substrate) -> dict[str, Any]:
    """Figures of the trained student in the teachers' own spaces."""
    import torch

    from vision_agglom.evaluate.report import Evaluation
    from vision_agglom.teachers import load_teacher
    from vision_agglom.trained import load_run, load_trained

    evaluated = load_run(run.run_dir)
    trained = load_trained(evaluated, run.run_dir, substrate)
    teachers = {teacher.name: load_teacher(teacher, substrate.device, torch.float32) for teacher in run.teachers}
    return Evaluation(evaluated, trained.radio, trained.step, teachers, substrate).report().to_json()


def clock(run: VisionConfig, substrate: Substrate) -> dict[str, Any]:
    """Images per second over the last half of the steps."""
    from megatron_hybrid.train.callbacks.metrics_file import metrics_path, read_metrics

    del substrate
    steps = [line for line in read_metrics(metrics_path(run.run_dir)) if line["kind"] == "step" and line["warm_up"] is None]
    speeds = [line["tokens_per_s"] for line in steps]
    return {"images_per_s": statistics.median(speeds[len(speeds) // 2 :])}


def standardizer_runs(arguments: argparse.Namespace) -> dict[str, VisionConfig]:
    """Label "KIND SEED" -> run."""
    runs = {}
    for seed in arguments.seeds:
        for kind in get_args(Standardizer):
            run = _small(arguments, f"standardizers/{kind}-{seed}", seed, MIXTURES["one"](arguments.batch), (128,))
            teachers = tuple(teacher.model_copy(update={"standardizer": kind}) for teacher in run.teachers)
            runs[f"{kind} {seed}"] = run.model_copy(update={"teachers": teachers})
    return runs


def resolution_runs(arguments: argparse.Namespace) -> dict[str, VisionConfig]:
    """Label "MIXTURE SEED" -> run."""
    return {
        f"{kind} {seed}": _small(arguments, f"resolutions/{kind}-{seed}", seed, mixture(arguments.batch), CURVE_SIDES)
        for seed in arguments.seeds
        for kind, mixture in MIXTURES.items()
    }


def partition_runs(arguments: argparse.Namespace) -> dict[str, VisionConfig]:
    """Label "all" or "partitioned" -> run."""
    runs = {}
    for kind in ("all", "partitioned"):
        mixture = [{"resolutions": [128], "batch_size": arguments.batch, "micro_batch_size": arguments.batch // arguments.ranks}]
        run = _small(arguments, f"partitions/{kind}-{arguments.ranks}", 0, mixture, (128,))
        parallel, options = ({"data": arguments.ranks}, {"teacher_ranks": kind})
        runs[kind] = run.model_copy(
            update={"parallel": run.parallel.model_copy(update=parallel), "train": run.train.model_copy(update=options)}
        )
    return runs


def show_standardizers(figures: dict[str, Any], picture: Path) -> str:
    """PHI-S's table: MSE in each teacher's own space, and the mean over teachers and seeds of the place among the seven."""
    kinds, seeds = _parts(figures)
    names = list(next(iter(figures.values()))["spatial"])
    mse = {kind: {name: [figures[f"{kind} {seed}"]["spatial"][name]["mse"] for seed in seeds] for name in names} for kind in kinds}
    places: dict[str, list[int]] = {kind: [] for kind in kinds}
    for name in names:
        for index in range(len(seeds)):
            ordered = sorted((mse[kind][name][index], kind) for kind in kinds)
            for place, (_, kind) in enumerate(ordered, start=1):
                places[kind].append(place)
    kinds = sorted(kinds, key=lambda kind: statistics.mean(places[kind]))
    variance = {name: next(iter(figures.values()))["spatial"][name]["teacher_variance"] for name in names}
    lines = [f"{'standardizer':<14}" + "".join(f"{name + ' MSE':>24}" for name in names) + f"{'mean rank':>12}"]
    for kind in kinds:
        cells = (f"{statistics.mean(mse[kind][name]):>14.5g} +- {_spread(mse[kind][name]):<6.2g}" for name in names)
        lines.append(f"{kind:<14}" + "".join(cells) + f"{statistics.mean(places[kind]):>12.2f}")
    lines.append(f"{'(variance)':<14}" + "".join(f"{variance[name]:>14.5g}{'':10}" for name in names))

    def draw(panels: list[Axes]) -> None:
        for axes, name in zip(panels, names, strict=True):
            for place, kind in enumerate(kinds):
                shares = [value / variance[name] for value in mse[kind][name]]
                axes.plot([place] * len(shares), shares, "o", ms=4, color="tab:blue", alpha=0.6)
                axes.plot([place - 0.3, place + 0.3], [statistics.mean(shares)] * 2, color="black")
            axes.axhline(1.0, color="gray", lw=0.8, ls=":")
            axes.set_xticks(range(len(kinds)), kinds, rotation=45)
            axes.set(title=f"{name}: MSE / variance", ylim=(0, 1.05))
            axes.grid(alpha=0.3, axis="y")

    _draw(picture, len(names), draw)
    return "\n".join(lines)


def show_resolutions(figures: dict[str, Any], picture: Path) -> str:
    """Fidelity to each teacher, and scale error, over the side of the images; means over seeds."""
    kinds, seeds = _parts(figures)
    names = list(next(iter(figures.values()))["spatial"])
    curves = {
        (kind, name): [[figures[f"{kind} {seed}"]["curves"][name][side]["fidelity"] for seed in seeds] for side in map(str, CURVE_SIDES)]
        for kind in kinds
        for name in names
    }
    others = [side for side in CURVE_SIDES if side != 128]
    errors = {kind: [[figures[f"{kind} {seed}"]["equivariance"][str(side)] for seed in seeds] for side in others] for kind in kinds}
    lines = [f"{'trained at':<12}{'measure':<20}" + "".join(f"{side:>9}" for side in CURVE_SIDES)]
    for (kind, name), by_side in curves.items():
        lines.append(f"{kind:<12}{name + ' fidelity':<20}" + "".join(f"{statistics.mean(values):>9.3f}" for values in by_side))
    for kind, by_side in errors.items():
        cells = dict(zip(others, (f"{statistics.mean(values):>9.4f}" for values in by_side), strict=True)) | {128: f"{'ref':>9}"}
        lines.append(f"{kind:<12}{'scale error':<20}" + "".join(cells[side] for side in CURVE_SIDES))

    def draw(panels: list[Axes]) -> None:
        for kind, colour in zip(kinds, ("tab:red", "tab:blue"), strict=True):
            shown = [*((axes, CURVE_SIDES, curves[kind, name]) for axes, name in zip(panels, names)), (panels[-1], others, errors[kind])]
            for axes, sides, by_side in shown:
                axes.plot(sides, [statistics.mean(values) for values in by_side], "o-", ms=3, color=colour, label=f"trained at {kind}")
                axes.fill_between(sides, [min(values) for values in by_side], [max(values) for values in by_side], color=colour, alpha=0.2)
        for axes, title in zip(panels, [*(f"{name}: fidelity" for name in names), "scale-equivariance error"], strict=True):
            axes.set(title=title, xlabel="side of the image in pixels", ylim=(0, None))
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)

    _draw(picture, len(names) + 1, draw)
    return "\n".join(lines)


def show_partitions(figures: dict[str, Any], picture: Path) -> str:
    """Images/s of both."""
    speeds = {kind: figures[kind]["images_per_s"] for kind in figures}

    def draw(panels: list[Axes]) -> None:
        panels[0].bar_label(panels[0].bar(list(speeds), list(speeds.values())), fmt="%.1f")
        panels[0].set(title="teachers: all on every rank, or divided", ylabel="images/s")
        panels[0].margins(y=0.1)

    _draw(picture, 1, draw)
    ratio = speeds["partitioned"] / speeds["all"]
    return "\n".join([f"{'teachers':<14}{'images/s':>10}", *(f"{k:<14}{v:>10.2f}" for k, v in speeds.items()), f"ratio {ratio:.3f}"])


STUDIES = {
    "partitions": Study(partition_runs, clock, show_partitions),
    "resolutions": Study(resolution_runs, evaluate, show_resolutions),
    "standardizers": Study(standardizer_runs, evaluate, show_standardizers),
}


def cut_tiles(images: Path) -> None:
    """Cut every held-out photograph into overlapping squares, once: more positions to measure on."""
    if (images / "held_out_tiles").exists():
        return
    write_shards(_tiles(images / "held_out"), images / "held_out_tiles" / "images", samples_per_shard=256)


def _tiles(folder: Path) -> Iterator[Record]:
    source = open_source(str(folder))
    for number in range(len(source)):
        square = decode_square(source.read(number).image, frame_whole, 2 * TILE)
        for index in range(TILES_PER_SIDE**2):
            top, left = (place * TILE // (TILES_PER_SIDE - 1) for place in divmod(index, TILES_PER_SIDE))
            yield Record(f"{number}-{index}.png", encode_png(square[top : top + TILE, left : left + TILE]))


def _small(arguments: argparse.Namespace, name: str, seed: int, partitions: list[dict[str, Any]], sides: tuple[int, ...]) -> VisionConfig:
    """The small run in one stage, from another seed of weights; the images and their order stay."""
    stage = {"steps": arguments.steps, "warmup_steps": min(20, arguments.steps // 4), "partitions": partitions}
    overrides = [
        f"run_dir={arguments.output / name}",
        f"seed={seed}",
        f"stages={json.dumps([stage])}",
        f"images.sources.photographs.path={arguments.images / 'photographs'}",
        f"images.sources.scenes.path={arguments.images / 'scenes'}",
        f"images.num_workers={arguments.workers}",
        f"evaluation.images={arguments.images / 'held_out_tiles'}",
        "evaluation.max_images=64",
        "evaluation.batch_size=64",
        f"evaluation.resolutions={list(sides)}",
        "evaluation.labelled_train=null",
        "evaluation.labelled_test=null",
        "validation.sources={}",
        f"logging.every_steps={arguments.steps}",
    ]
    return load_config(CONFIG, overrides)


def _parts(figures: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Kinds and seeds of labels "KIND SEED"."""
    kinds, seeds = zip(*(label.split() for label in figures), strict=True)
    return list(dict.fromkeys(kinds)), list(dict.fromkeys(seeds))


def _draw(picture: Path, columns: int, draw: Callable[[list[Axes]], None]) -> None:
    figure = Figure(figsize=(4 * columns, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    draw(list(figure.subplots(1, columns, squeeze=False)[0]))
    figure.savefig(picture, dpi=110)


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    sys.exit(main())
