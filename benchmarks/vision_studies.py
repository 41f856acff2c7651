"""Three studies on the small run of examples/radio: normalisations, resolutions, teachers divided over ranks.

    python -m benchmarks.vision_studies standardizers       7 normalisations x 3 seeds: MSE in the teachers' own spaces, mean rank
    python -m benchmarks.vision_studies resolutions         one resolution against several: fidelity and scale error over resolution
    python -m benchmarks.vision_studies partitions          every rank runs all teachers, or ranks divide them: images/s
    python -m benchmarks.vision_studies standardizers --seeds 1 --steps 20     a shorter one

Data and steps are the same throughout a study. The images are those of examples/radio/demo.py, which is run first where they are missing.
Runs are kept below --output and continued, or only evaluated, when the study is started again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

from megatron_hybrid.train.callbacks.metrics_file import metrics_path, read_metrics
from vision_agglom.config.distill import Standardizer
from vision_agglom.config.load import dump_config, load_config
from vision_agglom.config.schema import VisionConfig

CONFIG = Path("examples/radio/photographs.yaml")
IMAGES = Path("runs/radio/images")


def main() -> int:
    """Run one study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES), help="what is compared")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run (default: 200)")
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks of partitions (default: 2)")
    parser.add_argument("--output", type=Path, default=Path("runs/radio_studies"), help="where the runs go")
    arguments = parser.parse_args()
    if not IMAGES.exists():
        subprocess.run([sys.executable, "-c", "from examples.radio.demo import make_images; from pathlib import Path; "
                        f"make_images(Path({str(IMAGES)!r}))"], check=True)  # fmt: skip
    STUDIES[arguments.study](arguments)
    return 0


def compare_standardizers(arguments: argparse.Namespace) -> None:
    """PHI-S's table: MSE in each teacher's own space on held-out photographs."""
    kinds = get_args(Standardizer)
    mse: dict[str, dict[str, list[float]]] = {kind: {} for kind in kinds}
    for seed in range(arguments.seeds):
        for kind in kinds:
            run = _small(arguments, f"standardizers/{kind}-{seed}", seed)
            teachers = tuple(teacher.model_copy(update={"standardizer": kind}) for teacher in run.teachers)
            result = _train_and_evaluate(run.model_copy(update={"teachers": teachers}))
            for name, figures in result["spatial"].items():
                mse[kind].setdefault(name, []).append(figures["mse"])
    names = list(mse[kinds[0]])
    ranks = {kind: [] for kind in kinds}
    for name in names:
        for seed in range(arguments.seeds):
            for place, kind in enumerate(sorted(kinds, key=lambda kind: mse[kind][name][seed]), start=1):  # noqa: B023
                ranks[kind].append(place)
    print(f"\n{'standardizer':<14}" + "".join(f"{name + ' MSE':>24}" for name in names) + f"{'mean rank':>12}")
    for kind in sorted(kinds, key=lambda kind: statistics.mean(ranks[kind])):
        cells = (f"{statistics.mean(mse[kind][name]):>14.5g} +- {_spread(mse[kind][name]):<6.2g}" for name in names)
        print(f"{kind:<14}" + "".join(cells) + f"{statistics.mean(ranks[kind]):>12.2f}")


def compare_resolutions(arguments: argparse.Namespace) -> None:
    """The mode-switch curve of a student that saw one resolution and of one that saw several, images per step alike."""
    kinds = {
        "one": [{"resolutions": [128], "batch_size": 16, "micro_batch_size": 16}],
        "several": [
            {"resolutions": [64, 96, 128], "batch_size": 12, "micro_batch_size": 12},
            {"resolutions": [192, 256], "batch_size": 4, "micro_batch_size": 4},
        ],
    }
    for kind, partitions in kinds.items():
        for seed in range(arguments.seeds):
            run = _small(arguments, f"resolutions/{kind}-{seed}", seed, partitions)
            result = _train_and_evaluate(run)
            curves = {
                name: {int(side): round(figures["fidelity"], 3) for side, figures in by_side.items()}
                for name, by_side in result["curves"].items()
            }
            errors = {int(side): round(error, 4) for side, error in result["equivariance"].items()}
            print(json.dumps({"trained at": kind, "seed": seed, "fidelity": curves, "scale error": errors}), flush=True)


def compare_partitions(arguments: argparse.Namespace) -> None:
    """Images per second over the last half of the steps."""
    for kind in ("all", "partitioned"):
        run = _small(arguments, f"partitions/{kind}-{arguments.ranks}", 0)
        run = run.model_copy(
            update={
                "parallel": run.parallel.model_copy(update={"data": arguments.ranks}),
                "train": run.train.model_copy(update={"teacher_ranks": kind}),
                "stages": tuple(
                    stage.model_copy(
                        update={
                            "partitions": tuple(
                                part.model_copy(update={"micro_batch_size": part.batch_size // arguments.ranks})
                                for part in stage.partitions
                            )
                        }
                    )
                    for stage in run.stages
                ),
            }
        )
        _command("train", run)
        speeds = [line["tokens_per_s"] for line in read_metrics(metrics_path(run.run_dir)) if line["kind"] == "step"]
        print(json.dumps({"teacher_ranks": kind, "ranks": arguments.ranks, "images_per_s": statistics.median(speeds[len(speeds) // 2 :])}))


STUDIES = {"partitions": compare_partitions, "resolutions": compare_resolutions, "standardizers": compare_standardizers}


def _small(arguments: argparse.Namespace, name: str, seed: int, partitions: list[dict[str, Any]] | None = None) -> VisionConfig:
    """The small run in one stage, from another seed of weights; the images and their order stay."""
    partitions = partitions or [{"resolutions": [128], "batch_size": 16, "micro_batch_size": 16}]
    stage = {"steps": arguments.steps, "warmup_steps": min(20, arguments.steps // 4), "partitions": partitions}
    overrides = [
        f"run_dir={arguments.output / name}",
        f"seed={seed}",
        f"stages={json.dumps([stage])}",
        "evaluation.labelled_train=null",
        "evaluation.labelled_test=null",
        "validation.sources={}",
    ]
    return load_config(CONFIG, overrides)


def _train_and_evaluate(run: VisionConfig) -> dict[str, Any]:
    result = run.run_dir / "evaluation.json"
    if not result.exists():
        _command("train", run)
        subprocess.run([sys.executable, "-m", "vision_agglom", "evaluate", str(run.run_dir)], check=True, stdout=subprocess.DEVNULL)
    return json.loads(result.read_text())


def _command(verb: str, run: VisionConfig) -> None:
    file = run.run_dir.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_config(run))
    print(f"{verb} {run.run_dir}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "vision_agglom", verb, str(file)], check=True, stdout=subprocess.DEVNULL)


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    sys.exit(main())
