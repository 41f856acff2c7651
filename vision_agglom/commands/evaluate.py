"""``evaluate``: measure the student of a run directory."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hybrid.config import ConfigError
from vision_agglom.commands.arguments import verb_parser

if TYPE_CHECKING:
    from megatron_hybrid.substrate.context import Substrate
    from megatron_hybrid.substrate.exit_codes import ExitCode
    from vision_agglom.config.schema import VisionConfig

_EPILOG = """examples:
  python -m vision_agglom evaluate runs/radio/student
  python -m vision_agglom evaluate runs/radio/student evaluation.images=holdout/ 'evaluation.resolutions=[224, 432, 768, 1024]'

Prints tables and leaves evaluation.json, evaluation.png (curves over resolution) and features.png in the run directory.
"""


def main(argv: Sequence[str]) -> int:
    """Parse the command line and evaluate; returns the exit code."""
    parser = verb_parser("evaluate", "Measure a trained student against its teachers and on labelled images.", _EPILOG)
    parser.add_argument("run_dir", type=Path, help="run directory that train made")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="options that replace the run's, such as evaluation.max_images=16"
    )
    parser.add_argument("--step", type=int, help="checkpoint after this many steps; the newest sound one otherwise")
    arguments = parser.parse_intermixed_args(argv)
    from megatron_hybrid.substrate.quiet import silence_known_warnings

    silence_known_warnings()
    from megatron_hybrid.substrate.launch import run_on_ranks
    from vision_agglom.trained import load_run

    try:
        run = load_run(arguments.run_dir, arguments.overrides)
        run.check_evaluation()
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if run.evaluation.images is None and run.evaluation.labelled_train is None:
        print(
            f"error: {arguments.run_dir} names nothing to evaluate on; give evaluation.images=FOLDER, or evaluation.labelled_train and "
            "evaluation.labelled_test",
            file=sys.stderr,
        )
        return 2
    return run_on_ranks(partial(_evaluate, arguments), run)


def _evaluate(arguments: argparse.Namespace, run: VisionConfig, substrate: Substrate) -> ExitCode:
    import torch

    from megatron_hybrid.substrate.exit_codes import ExitCode
    from vision_agglom.evaluate.pictures import draw_curves, draw_features
    from vision_agglom.evaluate.report import Evaluation, format_report
    from vision_agglom.teachers import load_teacher
    from vision_agglom.trained import load_trained

    trained = load_trained(run, arguments.run_dir, substrate, step=arguments.step)
    dtype = torch.bfloat16 if run.train.teacher_precision == "bf16" else torch.float32
    teachers = {teacher.name: load_teacher(teacher, substrate.device, dtype) for teacher in run.teachers}
    evaluation = Evaluation(run, trained.radio, trained.step, teachers, substrate)
    report = evaluation.report()
    print(format_report(report))
    (arguments.run_dir / "evaluation.json").write_text(json.dumps(report.to_json(), indent=1) + "\n")
    shown = evaluation.shown()
    if shown is not None:
        draw_features(shown, arguments.run_dir / "features.png")
        draw_curves(report, arguments.run_dir / "evaluation.png")
        print(f"\nfeatures                {arguments.run_dir / 'features.png'}")
        print(f"curves over resolution  {arguments.run_dir / 'evaluation.png'}")
    return ExitCode.FINISHED
