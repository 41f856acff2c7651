"""Causal attention on a GPU, forward and backward, in every implementation and under deterministic algorithms: time, memory, repetition.

    python -m benchmarks.attention
    python -m benchmarks.attention --only 8b

Prints one JSON object per shape, implementation and switch: median milliseconds of forward and of forward + backward in BF16, what both
take of memory beyond inputs and gradients, and whether four runs give the same bits. What is not installed, or refuses, says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from megatron_hybrid.ops.registry import select

SHAPES = {"8b": (1, 8192, 32, 8, 128), "nano-4b": (1, 4096, 40, 8, 128), "56b-16k": (1, 16384, 64, 8, 128)}
"""Batch, length, query heads, key heads, head dimension."""
CASES = [
    ("cudnn", False),
    ("sdpa", False),
    ("sdpa", True),
    ("transformer_engine", False),
    ("transformer_engine", True),
]
"""Implementation, and whether torch is to be deterministic."""


def make_inputs(batch: int, length: int, heads: int, key_heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the result."""
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = (heads, key_heads, key_heads, heads)
    return tuple(torch.randn(batch, length, size, head_dim, device="cuda", dtype=torch.bfloat16, generator=generator) for size in sizes)


def measure(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> dict[str, Any]:
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]

    def both() -> tuple[Tensor, ...]:
        out = attention(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    first = both()
    repeats = all(torch.equal(ours, again) for _ in range(3) for ours, again in zip(first, both(), strict=True))
    kept = sum(tensor.nbytes for tensor in first)
    del first
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    extra = torch.cuda.max_memory_allocated() - before - kept
    with torch.no_grad():
        forward_ms = do_bench(partial(attention, q, k, v), return_mode="median")
    both_ms = do_bench(both, return_mode="median")
    return {"forward_ms": round(forward_ms, 3), "both_ms": round(both_ms, 3), "extra_mib": round(extra / 2**20), "repeats": repeats}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SHAPES, help="one shape alone")
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else SHAPES:
        for implementation, deterministic in CASES:
            line = {"shape": name, "implementation": implementation, "deterministic": deterministic}
            torch.use_deterministic_algorithms(deterministic)
            torch.utils.deterministic.fill_uninitialized_memory = False
            try:
                line |= measure(select("attention", implementation), *make_inputs(*SHAPES[name]))
            except (ValueError, RuntimeError) as error:
                line["refused"] = str(error).splitlines()[0]
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
