"""A training step on one GPU beside megatron-core's own MambaModel with Transformer Engine: same shapes, weights, data and optimizer.

    python -m benchmarks.gpu_step quarter-8b                           both systems in BF16, in processes of their own, and the ratio
    python -m benchmarks.gpu_step nano-4b --precision delayed          the same in float8
    python -m benchmarks.gpu_step quarter-8b --compare deterministic   ours with and without deterministic algorithms
    python -m benchmarks.gpu_step quarter-8b --system ours --lengths 2048,4096,8192,16384,32768,65536 --plot lengths.png
    python -m benchmarks.gpu_step quarter-8b --system ours --profile

quarter-8b is 13 layers of Nemotron-H 8B at 4 micro-batches of 1 x 8,192 tokens, nano-4b the whole Nemotron-3-Nano-4B at 8 of 1 x 4,096.
--lengths takes the same tokens a step at every length, at least 65,536. Prints a JSON line for each run, and one that compares two: exit
code 1 if a run failed or the losses differ by more than `gpu_step_comparison.py` allows, 2 if an option is wrong.
`gpu_step_systems.py` says what is timed and how.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ValidationError

from benchmarks.gpu_step_comparison import compare, length_table, plot_lengths
from benchmarks.options import picture
from megatron_hybrid.config import Fp8Config, RunConfig
from megatron_hybrid.config.errors import explain
from megatron_hybrid.config.load import load_model
from megatron_hybrid.substrate.quiet import silence_known_warnings

CASES = {
    "quarter-8b": ("nemotron-h-8b", ["model.pattern=M-M-M-M*-M-M-"], 8192, 4),
    "nano-4b": ("nemotron-3-nano-4b", [], 4096, 8),
}
"""Preset, its overrides, tokens per sample, micro-batches per step."""
LEAST_TOKENS_OVER_LENGTHS = 65536
PEER_PACKAGES = ("transformer_engine", "mamba_ssm", "causal_conv1d")


def make_run(
    case: str,
    precision: str,
    *,
    deterministic: bool = False,
    graphs: str = "auto",
    length: int | None = None,
    tokens: int | None = None,
    fp8_implementation: str = "auto",
    kernels: dict[str, str] | None = None,
) -> RunConfig:
    """The benchmark's run; nothing reads its paths.

    Args:
        case, precision: of ``CASES``; bf16, or a recipe of float8.
        deterministic, graphs, fp8_implementation: as the run's options.
        length: tokens per sample; None for the case's own.
        tokens: per step; None for the case's own.
        kernels: operations in implementations other than the host's own choice.

    Raises:
        ValueError: the length does not divide the tokens, or an option has no such value.
    """
    preset, overrides, case_length, num_micro_batches = CASES[case]
    length, tokens = case_length if length is None else length, case_length * num_micro_batches if tokens is None else tokens
    if length < 1 or tokens < 1 or tokens % length:
        raise ValueError(f"sequences of {length:,} tokens do not divide the {tokens:,} tokens of a step; change --length or --tokens")
    try:
        return RunConfig(
            run_dir=Path("unused"),
            model=load_model(preset, overrides)[0],
            data={"sources": {"none": Path("unused")}, "sequence_length": length},
            optimizer={"lr": 1e-4},
            train={"steps": 1, "global_batch_size": tokens // length},
            parallel={"data": 1},
            fp8={"recipe": "off" if precision == "bf16" else precision, "implementation": fp8_implementation},
            kernels=kernels or {},
            runtime={"device": "cuda", "deterministic": deterministic, "cuda_graphs": graphs},
        )
    except ValidationError as error:
        raise ValueError("; ".join(explain(error, RunConfig))) from error


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--precision", choices=("bf16", "delayed", "current"), default="bf16")
    parser.add_argument("--system", choices=("both", "ours", "peer"), default="both")
    parser.add_argument("--compare", choices=("peer", "deterministic"), default="peer", help="what ours is compared with (default: peer)")
    parser.add_argument("--steps", type=int, default=7, help="counted steps (default: %(default)s)")
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--length", type=int, metavar="TOKENS", help="another sequence length, at the same tokens per step")
    lengths.add_argument("--lengths", type=_lengths, metavar="TOKENS,...", help="one sequence length after another, and a table")
    parser.add_argument(
        "--tokens", type=int, help=f"tokens per step (default: those of the case; with --lengths at least {LEAST_TOKENS_OVER_LENGTHS})"
    )
    parser.add_argument("--plot", type=picture, metavar="PNG", help="draw what --lengths gives")
    parser.add_argument("--graphs", choices=("auto", "off"), default="auto", help="CUDA graphs of ours")
    parser.add_argument(
        "--fp8-implementation",
        choices=get_args(Fp8Config.model_fields["implementation"].annotation),
        default="auto",
        help="of ours, as fp8.implementation",
    )
    parser.add_argument("--deterministic", action="store_true", help="deterministic algorithms in ours")
    parser.add_argument("--kernels", nargs="*", default=[], metavar="OPERATION=IMPLEMENTATION", help="of ours, such as attention=sdpa")
    parser.add_argument("--profile", action="store_true", help="also print where the time of a step goes")
    return parser


def _lengths(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes whole numbers with commas between them, got {text!r}") from None


def parse(words: list[str] | None = None) -> tuple[argparse.Namespace, list[RunConfig]]:
    """The options, and the run of each sequence length; ends with a usage error where an option is wrong."""
    parser = make_parser()
    options = parser.parse_args(words)
    if options.plot is not None and options.lengths is None:
        parser.error("--plot draws what --lengths gives; pass --lengths")
    if options.compare == "deterministic" and (options.system == "peer" or options.deterministic):
        parser.error("--compare deterministic runs ours with and without deterministic algorithms; leave out --system and --deterministic")
    if options.lengths is not None and options.compare == "deterministic":
        parser.error("--lengths compares nothing with deterministic algorithms; pass --length")
    if options.steps < 1:
        parser.error(f"--steps must be 1 or more, got {options.steps}")
    if wrong := [choice for choice in options.kernels if "=" not in choice]:
        parser.error(f"--kernels takes OPERATION=IMPLEMENTATION, got {wrong[0]!r}")
    if options.lengths is not None and options.tokens is None:
        _, _, case_length, num_micro_batches = CASES[options.case]
        options.tokens = max(LEAST_TOKENS_OVER_LENGTHS, case_length * num_micro_batches)
    try:
        runs = [
            make_run(
                options.case,
                options.precision,
                deterministic=options.deterministic,
                graphs=options.graphs,
                length=length,
                tokens=options.tokens,
                fp8_implementation=options.fp8_implementation,
                kernels=dict(choice.split("=", 1) for choice in options.kernels),
            )
            for length in options.lengths or [options.length]
        ]
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here, and a GPU's training step is what this times")
    if options.system != "ours" and options.compare == "peer" and (missing := [name for name in PEER_PACKAGES if find_spec(name) is None]):
        parser.error(f"the peer needs {', '.join(missing)}, not installed here; install the extra gpu, or pass --system ours")
    return options, runs


def child_words(options: argparse.Namespace, run: RunConfig, system: str, deterministic: bool) -> list[str]:
    """The command line of one run in a process of its own."""
    words = [options.case, "--precision", options.precision, "--system", system, "--steps", str(options.steps), "--graphs", options.graphs]
    words += ["--length", str(run.data.sequence_length), "--tokens", str(run.tokens_per_step)]
    words += ["--fp8-implementation", options.fp8_implementation]
    words += ["--deterministic"] if deterministic else []
    words += ["--profile"] if options.profile else []
    return [*words, *(["--kernels", *options.kernels] if options.kernels else [])]


def run_child(options: argparse.Namespace, run: RunConfig, system: str, deterministic: bool) -> dict[str, Any] | None:
    """The report of one run in a process of its own, printed too; None, and a line that says so, where it failed."""
    command = [sys.executable, "-m", "benchmarks.gpu_step", *child_words(options, run, system, deterministic)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        what = f"{system} at {run.data.sequence_length:,} tokens a sequence"
        print(f"gpu_step: {what} failed with exit code {finished.returncode}; its own words stand above", file=sys.stderr)
        return None
    print(finished.stdout, end="", flush=True)
    return json.loads(finished.stdout.splitlines()[-1])


def run_one(options: argparse.Namespace, run: RunConfig) -> int:
    """Time one system in this process."""
    # megatron-core and Transformer Engine take seconds to import, which a wrong option need not wait for.
    from benchmarks.gpu_step_systems import measure

    silence_known_warnings()
    try:
        report = measure(options.system, run, options.steps, options.profile)
    except torch.OutOfMemoryError as error:
        print(f"gpu_step: out of memory: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        # What a run refuses once it sees its device.
        print(f"gpu_step: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"case": options.case, "precision": options.precision} | report))
    return 0


def main() -> int:
    """Print one JSON line per run, and one with the ratio, or a table over the lengths."""
    options, runs = parse()
    systems = ("peer", "ours") if options.system == "both" else (options.system,)
    if options.lengths is not None:
        reports = {
            (system, run.data.sequence_length): run_child(options, run, system, options.deterministic) for run in runs for system in systems
        }
        print(length_table(reports))
        if options.plot is not None:
            plot_lengths(reports, options.plot, title=f"{options.case}, {options.precision}, {options.tokens:,} tokens a step")
        return int(None in reports.values())
    (run,) = runs
    if options.compare == "deterministic":
        pair = [run_child(options, run, "ours", deterministic) for deterministic in (False, True)]
    elif options.system == "both":
        pair = [run_child(options, run, system, options.deterministic) for system in systems]
    else:
        return run_one(options, run)
    if None in pair:
        return 1
    comparison = compare(*pair, precision=options.precision)
    print(json.dumps({"case": options.case, "precision": options.precision, "against": options.compare} | comparison))
    return 0 if comparison["losses_agree"] else 1


if __name__ == "__main__":
    sys.exit(main())
