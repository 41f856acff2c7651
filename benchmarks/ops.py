"""Time of every op on a CPU, forward + backward: our fast version, its specification, and what transformers' Nemotron-H does there.

    python -m benchmarks.ops [--dtype bf16] [--threads 2] [--repeats 15] [--op ssd]
    python -m benchmarks.ops --threads 1 --cpu-time        # on a machine that has other work

Shapes are those of the training-step benchmark: batch 4, sequence 512, hidden 256, 8 Mamba heads of 64 in 2 groups, state 64, FFN 1024,
4 attention heads over 2 KV heads, vocabulary 4096. The versions of an op take turns, so that other work on the machine hits all alike;
medians and minima are printed. glibc hands every large buffer back to the kernel; what that costs shows when the run is repeated with
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 in the environment.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers.activations import ACT2FN
from transformers.models.nemotron_h import modeling_nemotron_h as peer

from megatron_hybrid.ops.registry import select

BATCH, LENGTH, HIDDEN, FFN, VOCABULARY = 4, 512, 256, 1024, 4096
HEADS, HEAD_DIM, GROUPS, STATE, WIDTH = 8, 64, 2, 64, 4
INNER, ATTENTION_HEADS, KV_HEADS = HEADS * HEAD_DIM, 4, 2
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One op: versions by name, each a function of the inputs that returns the tensor to differentiate."""

    inputs: tuple[Tensor, ...]
    versions: Mapping[str, Callable[..., Tensor]]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def sequence(*shape: int, dtype: torch.dtype) -> Tensor:
    """[B, L, ...] as the layers hold it: a transposed view of [L, B, ...]."""
    return torch.randn(LENGTH, BATCH, *shape).to(dtype).transpose(0, 1).requires_grad_()


def ssd_case(dtype: torch.dtype) -> Case:
    def ours(name: str) -> Callable[..., Tensor]:
        return lambda x, dt, a_log, b, c, d, bias: select("ssd", name)(x, dt, a_log, b, c, d, bias)[0]

    def transformers(x: Tensor, dt: Tensor, a_log: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor) -> Tensor:
        return peer.mamba2_chunk_scan(x, dt, -torch.exp(a_log), b, c, chunk_size=128, D=d, dt_bias=bias, dt_softplus=True)

    inputs = (
        sequence(HEADS, HEAD_DIM, dtype=dtype),
        sequence(HEADS, dtype=dtype),
        torch.rand(HEADS).requires_grad_(),
        sequence(GROUPS, STATE, dtype=dtype),
        sequence(GROUPS, STATE, dtype=dtype),
        torch.ones(HEADS).requires_grad_(),
        torch.full((HEADS,), -3.0).requires_grad_(),
    )
    return Case(inputs, {"cpu": ours("cpu"), "reference": ours("reference"), "transformers": transformers})


def conv_case(dtype: torch.dtype) -> Case:
    channels = INNER + 2 * GROUPS * STATE

    def transformers(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return peer.causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)

    versions = {name: lambda *tensors, op=select("causal_conv1d", name): op(*tensors)[0] for name in ("cpu", "reference")}
    inputs = (sequence(channels, dtype=dtype), random(channels, WIDTH, dtype=dtype), random(channels, dtype=dtype))
    return Case(inputs, versions | {"transformers": transformers})


def gated_norm_case(dtype: torch.dtype) -> Case:
    module = peer.NemotronHRMSNormGated(INNER, INNER // GROUPS, eps=EPS)

    def transformers(y: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (y, gate))

    versions = {name: lambda *tensors, op=select("gated_rms_norm", name): op(*tensors, GROUPS, EPS) for name in ("cpu", "reference")}
    inputs = (sequence(INNER, dtype=dtype), sequence(INNER, dtype=dtype), random(INNER, dtype=dtype))
    return Case(inputs, versions | {"transformers": transformers})


def norm_case(dtype: torch.dtype) -> Case:
    module = peer.NemotronHRMSNorm(HIDDEN, eps=EPS)
    versions = {name: lambda *tensors, op=select("rms_norm", name): op(*tensors, EPS) for name in ("cpu", "reference")}
    transformers = {"transformers": lambda x, weight: torch.func.functional_call(module, {"weight": weight}, (x,))}
    return Case((random(LENGTH, BATCH, HIDDEN, dtype=dtype), random(HIDDEN, dtype=dtype)), versions | transformers)


def activation_case(dtype: torch.dtype) -> Case:
    versions = {name: select("squared_relu", name) for name in ("cpu", "reference")} | {"transformers": ACT2FN["relu2"]}
    return Case((random(LENGTH, BATCH, FFN, dtype=dtype),), versions)


def linear_case(dtype: torch.dtype) -> Case:
    versions = {name: select("linear", name) for name in ("cpu", "reference")} | {"transformers": F.linear}
    return Case((random(LENGTH, BATCH, HIDDEN, dtype=dtype), random(2 * INNER + 2 * GROUPS * STATE + HEADS, HIDDEN, dtype=dtype)), versions)


def attention_case(dtype: torch.dtype) -> Case:
    def transformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (peer.repeat_kv(t.transpose(1, 2), ATTENTION_HEADS // KV_HEADS) for t in (k, v))
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)

    versions = {name: select("attention", name) for name in ("cpu", "reference")}
    inputs = tuple(sequence(heads, HIDDEN // ATTENTION_HEADS, dtype=dtype) for heads in (ATTENTION_HEADS, KV_HEADS, KV_HEADS))
    return Case(inputs, versions | {"transformers": transformers})


def loss_case(dtype: torch.dtype) -> Case:
    labels = torch.randint(VOCABULARY, (LENGTH, BATCH))
    weights = torch.full((LENGTH, BATCH), 1 / (LENGTH * BATCH))

    def transformers(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float().view(-1, VOCABULARY), labels.view(-1))

    versions = {
        name: lambda *tensors, op=select("linear_cross_entropy", name): op(*tensors, labels, weights, vocab_size=VOCABULARY)[0]
        for name in ("cpu", "reference")
    }
    inputs = (random(LENGTH, BATCH, HIDDEN, dtype=dtype), random(VOCABULARY, HIDDEN, dtype=dtype))
    return Case(inputs, versions | {"transformers": transformers})


CASES: Mapping[str, Callable[[torch.dtype], Case]] = {
    "ssd": ssd_case,
    "causal_conv1d": conv_case,
    "gated_rms_norm": gated_norm_case,
    "rms_norm": norm_case,
    "squared_relu": activation_case,
    "linear": linear_case,
    "attention": attention_case,
    "linear_cross_entropy": loss_case,
}


def measure(case: Case, num_repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds of each forward + backward, by version, after one round to warm up."""
    times_ms: dict[str, list[float]] = {name: [] for name in case.versions}
    cotangent = None
    for repeat in range(num_repeats + 1):
        for name, version in case.versions.items():
            start = clock()
            result = version(*case.inputs)
            if cotangent is None or cotangent.shape != result.shape:
                cotangent = torch.randn_like(result)
            torch.autograd.grad(result, case.inputs, cotangent)
            if repeat:
                times_ms[name].append(1e3 * (clock() - start))
    return times_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--op", choices=CASES, help="measure this one only")
    parser.add_argument("--cpu-time", action="store_true", help="count this thread's CPU time in place of wall time; needs --threads 1")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    arguments = parser.parse_args()
    if arguments.cpu_time and arguments.threads != 1:
        parser.error(f"--cpu-time sees one thread only: give --threads 1, not {arguments.threads}")

    clock, clock_name = (time.thread_time, "CPU time") if arguments.cpu_time else (time.perf_counter, "wall time")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    names = [arguments.op] if arguments.op else list(CASES)
    measured = {name: measure(CASES[name](dtype), arguments.repeats, clock) for name in tqdm(names, desc="ops", disable=None)}
    if arguments.json:
        print(json.dumps({"dtype": arguments.dtype, "threads": arguments.threads, "clock": clock_name, "times_ms": measured}))
        return
    print(f"{arguments.dtype}, threads: {arguments.threads}, forward + backward, {clock_name}, ms: median (minimum) of {arguments.repeats}")
    print(f"{'op':<22}{'cpu':>18}{'reference':>20}{'transformers':>20}{'transformers / cpu':>20}")
    for name, times_ms in measured.items():
        medians = {version: statistics.median(values) for version, values in times_ms.items()}
        cells = [f"{medians[version]:.2f} ({min(times_ms[version]):.2f})" for version in ("cpu", "reference", "transformers")]
        print(f"{name:<22}{cells[0]:>18}{cells[1]:>20}{cells[2]:>20}{medians['transformers'] / medians['cpu']:>19.2f}x")


if __name__ == "__main__":
    main()
