"""Which of cuBLASLt's algorithms is the fastest for each matrix product of a model, and how much that gains over its first guess and torch.

    python -m benchmarks.products nemotron-h-8b --tokens 8192
    python -m benchmarks.products nemotron-3-nano-4b --tokens 4096 --write megatron_hybrid/ops/cublaslt_choices.json

Times the three products of every linear as a micro-batch makes them, in BF16 and (but for the output layer) in float8, on random
numbers, and prints a line for each: what torch reaches (BF16 alone), the first guess, the best, in TFLOP/s. ``--write`` adds the choices
that beat the first guess by more than a hundredth to a file of pinned choices, which names the library's version and the kind of GPU they
are for.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.load import load_model
from megatron_hybrid.ops.cublaslt import Plan, problem_of, products_on
from megatron_hybrid.ops.product import multiply_torch

NUM_CANDIDATES, LEAST_GAIN = 8, 0.01
HEAD_ROWS = 4096
"""Rows of logits that the loss makes at a time."""
E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16


def linears_of(model: ModelConfig, tensor: int) -> Iterator[tuple[str, int, int, int]]:
    """Each kind of linear on one of ``tensor`` ranks: name, rows of its weight, columns, how many layers have it."""
    kinds = model.layer_kinds
    inner, states = model.mamba_num_heads * model.mamba_head_dim, model.mamba_num_groups * model.mamba_state_dim
    hidden, queries = model.hidden_size, model.num_attention_heads * model.head_dim
    yield "in_proj", (2 * inner + 2 * states + model.mamba_num_heads) // tensor, hidden, kinds.count("M")
    yield "out_proj", hidden, inner // tensor, kinds.count("M")
    for width, num_layers in Counter(model.ffn_hidden_sizes).items():
        yield "fc1", width // tensor, hidden, num_layers
        yield "fc2", hidden, width // tensor, num_layers
    yield "qkv", (queries + 2 * model.num_kv_heads * model.head_dim) // tensor, hidden, kinds.count("*")
    yield "proj", hidden, queries // tensor, kinds.count("*")
    yield "head", model.padded_vocab_size // tensor, hidden, 1


def operands(rows: int, columns: int, by_rows: bool, dtype: torch.dtype) -> Tensor:
    """Random numbers: what a GPU does costs more power, and so time, than zeros."""
    x = torch.randn(*((rows, columns) if by_rows else (columns, rows)), device="cuda").to(dtype)
    return x if by_rows else x.t()


def products_of(tokens: int, outputs: int, inputs: int, *, float8: bool) -> Iterator[tuple[str, Tensor, Tensor, Tensor, bool, bool]]:
    """Forward and both gradients of a linear: name, a, b, out, accumulate, fast."""
    forward, backward = (E4M3, E5M2) if float8 else (BF16, BF16)

    def out(rows: int, columns: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.zeros(rows, columns, dtype=dtype, device="cuda")

    yield "forward", operands(tokens, inputs, True, forward), operands(outputs, inputs, True, forward), out(tokens, outputs), False, float8
    yield "dx", operands(tokens, outputs, True, backward), operands(inputs, outputs, float8, forward), out(tokens, inputs), False, False
    dy, x = operands(outputs, tokens, float8, backward), operands(inputs, tokens, float8, forward)
    yield "dweight", dy, x, out(outputs, inputs, torch.float32), True, False


def sustained_ms(step: Callable[[], object], seconds: float) -> float:
    """Milliseconds of a step once it has run for half of ``seconds``.

    A GPU under matrix products slows down to keep its power limit, within some tenths of a second, and by how much depends on the
    algorithm: the fastest of a short burst was no faster in a training step (docs/log.md).
    """
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    start.record()
    step()
    middle.record()
    torch.cuda.synchronize()
    num_runs = max(2, int(500 * seconds / start.elapsed_time(middle)))
    for _ in range(num_runs):
        step()
    middle.record()
    for _ in range(num_runs):
        step()
    end.record()
    torch.cuda.synchronize()
    return middle.elapsed_time(end) / num_runs


def tune(name: str, a: Tensor, b: Tensor, out: Tensor, accumulate: bool, fast: bool, seconds: float) -> tuple[str, int, dict[str, float]]:
    """The problem as text, the best candidate, and milliseconds of torch, the first guess and the best."""
    problem = problem_of(a, b, out, accumulate=accumulate, fast=fast)
    plan = Plan(products_on(0), problem, NUM_CANDIDATES)
    one = torch.ones((), device="cuda") if a.dtype.itemsize == 1 else None
    steps: list[Callable[[], object]] = [lambda candidate=each: plan.run(candidate, a, b, out, one, one) for each in plan.candidates]
    if one is None:
        steps.append(lambda: multiply_torch(a, b, out=out, accumulate=accumulate))
    times = [sustained_ms(step, seconds) for step in steps]
    guesses = times[: len(plan.candidates)]
    best = min(range(len(guesses)), key=guesses.__getitem__)
    if guesses[best] > (1 - LEAST_GAIN) * guesses[0]:
        best = 0
    found = {"first": guesses[0], "best": guesses[best]} | ({"torch": times[-1]} if one is None else {})
    flops = 2 * problem.m * problem.n * problem.k
    rates = {key: round(flops / value / 1e9) for key, value in found.items()}
    print(json.dumps({"product": name, "problem": str(problem), "choice": best, "TFLOP/s": rates}), flush=True)
    return str(problem), best, found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.products", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a preset, or a YAML file with a model")
    parser.add_argument("--tokens", type=int, required=True, help="tokens of a micro-batch")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=0.4, help="that each algorithm runs, half of it before the clock (default: %(default)s)"
    )
    parser.add_argument("--write", type=Path, help="a file of pinned choices to add to")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device, and torch sees none")
    model = load_model(arguments.model, [])[0]
    chosen: dict[str, int] = {}
    sums: dict[str, dict[str, float]] = {}
    for float8, (linear, outputs, inputs, num_layers) in itertools.product((False, True), linears_of(model, arguments.tensor)):
        if num_layers == 0 or (float8 and linear == "head"):
            continue
        tokens = min(arguments.tokens, HEAD_ROWS) if linear == "head" else arguments.tokens
        for name, *product in products_of(tokens, outputs, inputs, float8=float8):
            problem, best, found = tune(f"{linear} {name}", *product, arguments.seconds)
            chosen[problem] = best
            total = sums.setdefault("float8" if float8 else "bf16", {})
            for key, value in found.items():
                total[key] = total.get(key, 0.0) + value * num_layers * (arguments.tokens // tokens)
    for precision, total in sums.items():
        print(json.dumps({"micro-batch": arguments.model, precision: {key: round(value, 2) for key, value in total.items()}}))
    if arguments.write:
        pinned = json.loads(arguments.write.read_text(encoding="utf-8"))
        of_this_host = pinned.get(products_on(0).host, {}) | chosen
        pinned[products_on(0).host] = dict(sorted((problem, best) for problem, best in of_this_host.items() if best))
        arguments.write.write_text(json.dumps(pinned, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
