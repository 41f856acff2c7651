"""Convert checkpoints between Hugging Face, Megatron-LM and this project, and prove it: ``python -m tools.convert_checkpoint --help``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hybrid.config import ModelConfig, TokenizerConfig
from megatron_hybrid.config.load import load_model
from megatron_hybrid.data.tokenizer import tokenizer_kind
from tools.failure import BAD_PATH, ERROR, FINISHED, run_tool

if TYPE_CHECKING:
    from megatron_hybrid.convert.source import Source
    from megatron_hybrid.convert.target import Layout, Plan, Target

_KEPT = "whatever is written is kept, and the same command continues"
KINDS = ("hf", "megatron", "native")
EXAMPLE = """examples:
  python -m tools.convert_checkpoint --from native --to hf runs/mine exported/mine
  python -m tools.convert_checkpoint --from hf --to native downloads/Nemotron-H-8B runs/nemotron-h-8b --tensor 8
  python -m tools.convert_checkpoint --from megatron --to hf checkpoints/run7 exported/run7 --dtype bfloat16 --hf-style hub

hf: a NemotronH directory. native: a run directory, or one checkpoint in it. megatron: a torch_dist iter_NNNNNNN, or the folder above.
TARGET appears under its name only after the verdict. An interrupted conversion continues when the same command is given again.
exit code: 0 converted and proven, 1 failed (such as a full disk) or the verdict is against it (TARGET.rejected), 2 refused because an
option or an input is wrong, 130 interrupted."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert_checkpoint",
        description="Convert the weights of a checkpoint, tensor by tensor, and compare what was written with what was read.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source_kind", choices=KINDS, required=True, help="what SOURCE is")
    parser.add_argument("--to", dest="target_kind", choices=KINDS, required=True, help="what TARGET will be")
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    parser.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16"),
        default="keep",
        help="of the target; A_log, D and dt_bias are float32 in any case (default: keep)",
    )
    parser.add_argument(
        "--tensor",
        type=_positive,
        metavar="N",
        help="megatron, native: cut the target for this many tensor ranks (default: 1; any number can read it)",
    )
    parser.add_argument("--pipeline", type=_positive, metavar="N", help="megatron, native: the same for pipeline stages")
    parser.add_argument(
        "--vocab-divisible-by",
        type=_positive,
        metavar="N",
        help="megatron, native: pad the vocabulary to a multiple of this (default: the source's, 128 from hf)",
    )
    parser.add_argument(
        "--hf-style",
        choices=("transformers", "hub"),
        help="hf: names under model. with layers_block_type (default), or under backbone. with hybrid_override_pattern",
    )
    parser.add_argument("--shard-gb", type=float, metavar="GB", help="hf: size of a safetensors file (default: 5)")
    parser.add_argument(
        "--config", metavar="FILE", help="from megatron: config.json, run YAML or preset, for a checkpoint without arguments"
    )
    parser.add_argument(
        "--vocab-size", type=_positive, metavar="N", help="from megatron: tokens without padding, for arguments that do not say"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="carry this one along instead of the source's")
    parser.add_argument(
        "--verdict",
        choices=("full", "bits"),
        default="full",
        help="bits: leave the comparison of logits with transformers out (default: full)",
    )
    parser.add_argument("--verify-only", action="store_true", help="write nothing: give the verdict on a TARGET that is there")
    return parser


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that the chosen kinds have no use for.

    Raises:
        ValueError: names the option.
    """
    of_torch_dist = {"--tensor": arguments.tensor, "--pipeline": arguments.pipeline, "--vocab-divisible-by": arguments.vocab_divisible_by}
    of_hf = {"--hf-style": arguments.hf_style, "--shard-gb": arguments.shard_gb}
    of_megatron_source = {"--config": arguments.config, "--vocab-size": arguments.vocab_size}
    for options, fits, where in (
        (of_torch_dist, arguments.target_kind != "hf", "--to megatron or native"),
        (of_hf, arguments.target_kind == "hf", "--to hf"),
        (of_megatron_source, arguments.source_kind == "megatron", "--from megatron"),
    ):
        given = [name for name, value in options.items() if value is not None]
        if given and not fits:
            raise ValueError(f"{', '.join(given)} means something only with {where}; drop it")
    if arguments.shard_gb is not None and not arguments.shard_gb > 0:
        raise ValueError(f"--shard-gb must be above 0, got {arguments.shard_gb}")


def open_source(arguments: argparse.Namespace) -> Source:
    """Open and check the source.

    Raises:
        ValueError: it is not what it should be.
    """
    from megatron_hybrid.convert.hub import HubSource
    from megatron_hybrid.convert.megatron import MegatronSource
    from megatron_hybrid.convert.native import NativeSource

    if arguments.source_kind == "hf":
        return HubSource(arguments.source, vocab_divisible_by=arguments.vocab_divisible_by or 128)
    if arguments.source_kind == "native":
        return NativeSource(arguments.source, tokenizer=_given_tokenizer(arguments))
    model = None if arguments.config is None else _read_model(arguments.config)
    return MegatronSource(arguments.source, model=model, vocab_size=arguments.vocab_size)


def make_target(kind: str, plan: Plan, final: Path) -> Target:
    """Return the target of a kind.

    Raises:
        ValueError: the plan does not suit it.
    """
    from megatron_hybrid.convert.hub import HubTarget
    from megatron_hybrid.convert.megatron import MegatronTarget
    from megatron_hybrid.convert.native import NativeTarget

    return HubTarget(plan) if kind == "hf" else {"megatron": MegatronTarget, "native": NativeTarget}[kind](plan, final)


def give_verdict(source: Source, target: Target, directory: Path, plan: Plan, *, with_logits: bool) -> bool:
    """Open what is in the directory anew, compare it with the source, print what is found, and return whether it is good."""
    from megatron_hybrid.convert.companions import companion_differences
    from megatron_hybrid.convert.verdict import compare_round_trip

    try:
        written = target.read_back(directory)
        beside = companion_differences(plan.companions, written.companions)
    except ValueError as error:
        print(f"verdict: FAILED, {error}")
        return False
    round_trip = compare_round_trip(source, written, plan)
    if round_trip.passed:
        print(f"round trip: all {round_trip.num_tensors:,} tensors of the source come back bit for bit")
    else:
        _print_differences("round trip", round_trip.differing)
    if beside:
        _print_differences("tokenizer and special tokens", beside)
    elif plan.companions.tokenizer_files:
        print(f"tokenizer and special tokens: as in the source, {len(plan.companions.tokenizer_files)} files byte for byte")
    good = round_trip.passed and not beside
    if with_logits and _take_the_same_tokens(source.model, written.model):
        good = _compare_logits(source, written, plan) and good
    print(f"verdict: {'passed' if good else 'FAILED'}")
    return good


def _print_differences(what: str, differences: Sequence[str]) -> None:
    print(f"{what}: {len(differences):,} {'difference' if len(differences) == 1 else 'differences'}")
    print("\n".join(f"  {line}" for line in differences[:10]))


def _take_the_same_tokens(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two models can be run over the same tokens and compared layer by layer."""
    return all(getattr(one, name) == getattr(other, name) for name in ("layer_kinds", "hidden_size", "vocab_size"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: see the help."""
    arguments = build_parser().parse_args(argv)
    return run_tool(lambda: _convert(arguments), _KEPT)


def _convert(arguments: argparse.Namespace) -> int:
    check_options(arguments)
    # Only now: torch and megatron-core take seconds that a typing error should not have to wait for.
    from megatron_hybrid.substrate.host_memory import map_large_blocks
    from megatron_hybrid.substrate.quiet import silence_known_warnings

    silence_known_warnings()
    map_large_blocks()
    import torch

    from megatron_hybrid.convert.companions import with_tokenizer
    from megatron_hybrid.convert.job import plan_conversion, publish, reject, run_conversion
    from megatron_hybrid.convert.widen import with_one_width

    source = open_source(arguments)
    if arguments.target_kind != "native" and with_one_width(source) is not source:
        narrowest, widest = min(source.model.ffn_hidden_sizes), max(source.model.ffn_hidden_sizes)
        print(
            f"MLP layers are {narrowest} to {widest} wide; {arguments.target_kind} has one width, so zeros fill all of them up to {widest}"
        )
        source = with_one_width(source)
    dtype = None if arguments.dtype == "keep" else getattr(torch, arguments.dtype)
    divisible_by = arguments.vocab_divisible_by if arguments.source_kind != "hf" else None
    plan = plan_conversion(source, _layout(arguments), dtype=dtype, vocab_divisible_by=divisible_by)
    tokenizer = _given_tokenizer(arguments)
    if tokenizer is not None:
        plan = replace(plan, companions=with_tokenizer(plan.companions, tokenizer))
    target = make_target(arguments.target_kind, plan, arguments.target)
    with_logits = arguments.verdict == "full"
    if arguments.verify_only:
        if not arguments.target.exists():
            raise ValueError(f"{arguments.target} does not exist, so there is nothing to verify")
        good = give_verdict(source, target, arguments.target, plan, with_logits=with_logits)
        return FINISHED if good else ERROR
    try:
        partial = run_conversion(source, target, plan, arguments.target)
    except BAD_PATH:
        raise
    except OSError as error:
        raise OSError(f"{error}; {_KEPT}") from error
    if give_verdict(source, target, partial, plan, with_logits=with_logits):
        publish(partial, arguments.target)
        print(f"written: {arguments.target}")
        return FINISHED
    print(f"error: {reject(partial, arguments.target)} is not what {arguments.source} is", file=sys.stderr)
    return ERROR


def _compare_logits(source: Source, target: Source, plan: Plan) -> bool:
    if "hub" not in (source.form, target.form):
        print("logits: not compared; both sides have the same tensors under the same names")
        return True
    if importlib.util.find_spec("transformers") is None:
        print("logits: not compared; transformers is not installed")
        return True
    import transformers

    from megatron_hybrid.convert.logits import LENGTH, Bounds, compare_logits

    bounds = Bounds()
    ours, hub = (target, source) if target.form == "native" else (source, target)
    report = compare_logits(ours, hub, plan.dtypes, bounds)
    failures = report.failures(bounds)
    print(
        f"logits of {LENGTH} tokens, ours and transformers {transformers.__version__} in fp32: largest error {report.max_error:.3g} and "
        f"mean {report.mean_error:.3g} of {report.scale:.3g}, cosine {report.cosine:.9f}, greedy agreement {report.agreement:.4f}"
    )
    for failure in failures:
        print(f"  {failure}")
    return not failures


def _layout(arguments: argparse.Namespace) -> Layout:
    from megatron_hybrid.convert.target import Layout

    shard_bytes = Layout.shard_bytes if arguments.shard_gb is None else int(arguments.shard_gb * 1e9)
    return Layout(arguments.tensor or 1, arguments.pipeline or 1, arguments.hf_style or Layout.style, shard_bytes)


def _given_tokenizer(arguments: argparse.Namespace) -> TokenizerConfig | None:
    path = arguments.tokenizer
    return None if path is None else TokenizerConfig(kind=tokenizer_kind(path), path=path)


def _read_model(text: str) -> ModelConfig:
    if text.endswith(".json"):
        # Comes with torch.
        from megatron_hybrid.convert.companions import read_json
        from megatron_hybrid.convert.hub_config import model_from_hub

        return model_from_hub(read_json(Path(text)))
    return load_model(text)[0]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
