"""What MiniPuzzle costs and gains on the device at hand: the distillation loss, the scoring sweep, and decoding before and after.

    python -m benchmarks.minipuzzle loss [--tokens 8192] [--hidden 4096] [--vocab 131072]     beside the specification and modelopt
    python -m benchmarks.minipuzzle sweep [--preset hybrid-1b] [--layers N]                   one sweep beside layers + 1 of them
    python -m benchmarks.minipuzzle decode [--preset nemotron-h-8b] [--share 0.83] [--context 65536] [--batch 8]

Weights are random: time does not depend on them. Versions take turns; medians are printed. modelopt is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_hybrid.config import ModelConfig, RunConfig
from megatron_hybrid.config.load import load_model
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.substrate.launch import run_on_ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.minipuzzle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("loss", "sweep", "decode"))
    parser.add_argument("--preset", help="model (sweep: hybrid-1b, decode: nemotron-h-8b)")
    parser.add_argument("--layers", type=int, help="sweep: only the first so many layers of the preset")
    parser.add_argument("--tokens", type=int, default=8192, help="loss: tokens; sweep: sequence length")
    parser.add_argument("--hidden", type=int, default=4096, help="loss: width of student and teacher")
    parser.add_argument("--vocab", type=int, default=131072, help="loss: vocabulary")
    parser.add_argument("--share", type=float, default=0.83, help="decode: the child's share of the parent's memory")
    parser.add_argument("--context", type=int, default=65536, help="decode: tokens in the cache")
    parser.add_argument("--batch", type=int, default=8, help="decode: sequences")
    parser.add_argument("--repetitions", type=int, default=10)
    arguments = parser.parse_args(argv)
    for name in ("tokens", "hidden", "vocab", "share", "context", "batch", "repetitions", "layers"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be above 0, got {value}")
    preset = arguments.preset or {"sweep": "hybrid-1b"}.get(arguments.what, "nemotron-h-8b")
    try:
        model = load_model(preset)[0]
    except ValueError as error:
        parser.error(f"--preset: {error}")
    if arguments.layers:
        model = model.model_copy(update={"pattern": model.layer_kinds[: arguments.layers]})
    run = RunConfig(
        run_dir=Path("unset"),
        model=model.model_dump() | {"pattern": model.layer_kinds},
        data={"sources": {"unset": Path("unset")}, "sequence_length": arguments.tokens},
        optimizer={"lr": 1e-5},
        train={"steps": 1, "global_batch_size": 1, "precision": "bf16" if torch.cuda.is_available() else "fp32"},
        runtime={"deterministic": False},
    )
    return run_on_ranks({"loss": LossBenchmark, "sweep": SweepBenchmark, "decode": DecodeBenchmark}[arguments.what](arguments), run)


class _Benchmark:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments

    def time(self, versions: Mapping[str, Callable[[], object]], substrate: Substrate) -> dict[str, dict[str, float]]:
        """Median milliseconds, and on a GPU the peak GiB above what was there before."""
        elapsed: dict[str, list[float]] = {name: [] for name in versions}
        peaks: dict[str, float] = {}
        on_cuda = substrate.device.type == "cuda"
        for _ in range(2 + self.arguments.repetitions):
            for name, call in versions.items():
                if on_cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                start_s = time.perf_counter()
                call()
                if on_cuda:
                    torch.cuda.synchronize()
                    peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
                elapsed[name].append(1e3 * (time.perf_counter() - start_s))
        return {
            name: {"ms": round(statistics.median(values[2:]), 3)} | ({"peak_gib": round(peaks[name], 3)} if peaks else {})
            for name, values in elapsed.items()
        }

    def report(self, substrate: Substrate, **values: object) -> ExitCode:
        """One JSON line."""
        device = (
            torch.cuda.get_device_name(substrate.device) if substrate.device.type == "cuda" else f"cpu, {substrate.num_threads} threads"
        )
        print(json.dumps({"what": self.arguments.what, "device": device, "torch": torch.__version__, **values}), flush=True)
        return ExitCode.FINISHED


class LossBenchmark(_Benchmark):
    """Forward and backward of the distillation loss, from both models' last hidden states."""

    def __call__(self, run: RunConfig, substrate: Substrate) -> ExitCode:
        """Run it."""
        from megatron_hybrid.ops.registry import select
        from megatron_hybrid.substrate.transformer_config import build_transformer_config

        arguments = self.arguments
        dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
        options = {"dtype": dtype, "device": substrate.device}
        hidden = torch.randn(arguments.tokens, 1, arguments.hidden, **options).requires_grad_()
        teacher = torch.randn(arguments.tokens, 1, arguments.hidden, **options)
        weight = (torch.randn(arguments.vocab, arguments.hidden, **options) * 0.02).requires_grad_()
        teacher_weight = torch.randn(arguments.vocab, arguments.hidden, **options) * 0.02
        ones = torch.ones(arguments.tokens, 1, device=substrate.device)
        losses: dict[str, float] = {}

        def run_version(name: str, loss: Callable[[], Tensor]) -> None:
            hidden.grad = weight.grad = None
            total = loss()
            total.backward()
            losses[name] = float(total.detach()) / arguments.tokens

        def ours(operation: Callable) -> Tensor:
            return operation(hidden, weight, teacher, teacher_weight, ones, vocab_size=arguments.vocab)[0]

        names = ("triton", "cpu", "reference") if substrate.device.type == "cuda" else ("cpu", "reference")
        versions = {name: partial(ours, select("linear_kl_divergence", name)) for name in names}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from modelopt.torch.distill.plugins.megatron import LogitsKLLoss
        except ImportError:
            print("modelopt is not installed: left out", file=sys.stderr)
        else:
            criterion = LogitsKLLoss(build_transformer_config(run, substrate))
            versions["modelopt"] = lambda: (criterion(hidden @ weight.t(), teacher @ teacher_weight.t())[0].t() * ones).sum()
        timed = self.time({name: partial(run_version, name, loss) for name, loss in versions.items()}, substrate)
        return self.report(substrate, precision=run.train.precision, loss=losses, **timed)


class SweepBenchmark(_Benchmark):
    """Importance of every layer on one sample: the sweep that shares prefixes, beside one full sweep for every layer and one more."""

    @torch.no_grad()
    def __call__(self, run: RunConfig, substrate: Substrate) -> ExitCode:
        """Run it."""
        from megatron_hybrid.data.loader import MicroBatch
        from tools.minipuzzle.forward import StageForward
        from tools.minipuzzle.importance import sweep
        from tools.minipuzzle.timing import random_model

        model = random_model(run, substrate)
        stage, layers, length = StageForward(model, run, substrate), list(model.decoder.layers), self.arguments.tokens
        tokens = torch.randint(run.model.vocab_size, (1, length))
        batch = MicroBatch(torch.zeros(1), tokens, tokens, torch.ones(1, length), torch.zeros(1, length, dtype=torch.int32), 0)

        def full_sweeps() -> None:
            for without in (None, *range(len(layers))):
                hidden, sequence = stage.enter(batch)[0], stage.describe(batch)
                for number, layer in enumerate(layers):
                    if number != without:
                        hidden = layer(hidden, sequence)
                stage.leave([hidden])

        timed = self.time({"one sweep": lambda: sweep(stage, batch), "layers + 1 sweeps": full_sweeps}, substrate)
        gain = timed["layers + 1 sweeps"]["ms"] / timed["one sweep"]["ms"]
        return self.report(substrate, layers=len(layers), tokens=length, gain=round(gain, 3), **timed)


class DecodeBenchmark(_Benchmark):
    """Decoding steps of a preset and of the child that a search with made-up scores gives it."""

    def __call__(self, run: RunConfig, substrate: Substrate) -> ExitCode:
        """Run it."""
        from tools.minipuzzle.config import LatencyConfig, MemoryConfig, SearchConfig
        from tools.minipuzzle.memory import model_memory
        from tools.minipuzzle.scores import synthetic_scores
        from tools.minipuzzle.search import search_grid
        from tools.minipuzzle.timing import time_decoding

        arguments, parent = self.arguments, run.model
        memory = MemoryConfig(context_tokens=arguments.context, batch_size=arguments.batch)
        memory = memory.model_copy(update={"limit_gib": arguments.share * model_memory(parent, memory).total_gib})
        widths = tuple(parent.ffn_hidden_size * eighths // 8 for eighths in range(5, 9))
        found = search_grid(parent, synthetic_scores(parent, 0), SearchConfig(ffn_hidden_sizes=widths, memory=memory))
        child: ModelConfig = found[0].candidate.model(parent)
        setting = LatencyConfig(context_tokens=arguments.context, batch_size=arguments.batch, repetitions=arguments.repetitions)
        timed = time_decoding({"parent": run, "child": run.model_copy(update={"model": child})}, substrate, setting)
        tokens_per_s = {name: 1e3 * arguments.batch / each.decode_ms for name, each in timed.items()}
        return self.report(
            substrate,
            preset_cut=found[0].candidate.describe(parent),
            ratio=round(tokens_per_s["child"] / tokens_per_s["parent"], 3),
            tokens_per_s={name: round(value, 1) for name, value in tokens_per_s.items()},
            **{name: vars(replace(each, decode_ms=round(each.decode_ms, 3))) for name, each in timed.items()},
        )


if __name__ == "__main__":
    sys.exit(main())
