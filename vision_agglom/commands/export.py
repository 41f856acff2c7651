"""``export``: write the student of a run directory in the formats that users load."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hybrid.config import ConfigError
from vision_agglom.commands.arguments import verb_parser
from vision_agglom.config.schema import check_image_side

if TYPE_CHECKING:
    from megatron_hybrid.substrate.context import Substrate
    from megatron_hybrid.substrate.exit_codes import ExitCode
    from vision_agglom.config.schema import VisionConfig
    from vision_agglom.trained import TrainedStudent

_EPILOG = """examples:
  python -m vision_agglom export runs/radio/student exported/
  python -m vision_agglom export runs/radio/student exported/ --formats hub onnx --image-side 432

Writes OUTPUT/radio.pth (torch.hub, NVlabs/RADIO's loader; heads and adaptors included), OUTPUT/transformers/ (RadioModel; the backbone)
and OUTPUT/radio.onnx (backbone and heads for one image side, compared with torch in onnxruntime). Spectral scales are multiplied into the
weights, and heads speak the teachers' own spaces. A format that cannot be such a student is left out, saying why; it is an error where
--formats names it, or where none is left. An ONNX graph that says something else than torch is not
kept, nor is an older one, and the export ends with exit code 1.
"""


def main(argv: Sequence[str]) -> int:
    """Parse the command line and export; returns the exit code."""
    parser = verb_parser("export", "Write a trained student for torch.hub, transformers and ONNX.", _EPILOG)
    parser.add_argument("run_dir", type=Path, help="run directory that train made")
    parser.add_argument("output", type=Path, help="folder to write into; made where it is not there")
    parser.add_argument("--formats", nargs="+", choices=_FORMATS, help="what to write (default: every format that can be such a student)")
    parser.add_argument(
        "--image-side",
        type=int,
        help="side in pixels that the files name, and that ONNX is for (default: the one that evaluate measures at)",
    )
    parser.add_argument("--step", type=int, help="checkpoint after this many steps; the newest sound one otherwise")
    arguments = parser.parse_args(argv)
    from megatron_hybrid.substrate.quiet import silence_known_warnings

    silence_known_warnings()
    from megatron_hybrid.substrate.launch import run_on_ranks
    from vision_agglom.trained import load_run

    try:
        run = load_run(arguments.run_dir)
        if arguments.image_side is None:
            arguments.image_side = run.evaluation_resolution
        check_image_side(arguments.image_side, "--image-side", run.student)
        _check_output(arguments.output)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run_on_ranks(partial(_export, arguments), run)


def _check_output(output: Path) -> None:
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"cannot write into {output}: {existing} is a file; name a folder")


def _export(arguments: argparse.Namespace, run: VisionConfig, substrate: Substrate) -> ExitCode:
    from megatron_hybrid.substrate.exit_codes import ExitCode
    from vision_agglom.trained import load_trained

    trained = load_trained(run, arguments.run_dir, substrate, step=arguments.step)
    print(f"{trained.checkpoint}, {arguments.image_side} pixels", flush=True)
    written = write_formats(trained, arguments.output, arguments.image_side, arguments.formats or list(_FORMATS))
    return ExitCode.FINISHED if written and (arguments.formats is None or len(written) == len(arguments.formats)) else ExitCode.ERROR


def write_formats(trained: TrainedStudent, output: Path, side: int, formats: Sequence[str]) -> list[str]:
    """Write those formats that can be such a student, saying of the others why they cannot; return the ones written."""
    from vision_agglom.export.unsupported import UnsupportedStudentError

    written = []
    for name in formats:
        try:
            line = _FORMATS[name](trained, output, side)
        except UnsupportedStudentError as error:
            print(f"{name} is not written: {error}", file=sys.stderr, flush=True)
        else:
            print(line, flush=True)
            written.append(name)
    return written


def _write_hub(trained: TrainedStudent, output: Path, side: int) -> str:
    from vision_agglom.export.hub import write_hub_checkpoint

    path = output / "radio.pth"
    write_hub_checkpoint(trained.radio, path, input_side=side)
    return f"{path}: torch.hub.load('NVlabs/RADIO', 'radio_model', version='{path}')"


def _write_transformers(trained: TrainedStudent, output: Path, side: int) -> str:
    from vision_agglom.export.transformers import write_transformers

    folder = output / "transformers"
    write_transformers(trained.radio, folder, image_side=side)
    return f"{folder}: transformers.AutoModel.from_pretrained('{folder}')"


def _write_onnx(trained: TrainedStudent, output: Path, side: int) -> str:
    from vision_agglom.export.onnx import write_onnx

    path = output / "radio.onnx"
    difference = write_onnx(trained.radio, path, image_side=side)
    return f"{path}: images [batch, 3, {side}, {side}]; onnxruntime agrees with torch to {difference:.1e}"


_FORMATS = {"hub": _write_hub, "transformers": _write_transformers, "onnx": _write_onnx}
