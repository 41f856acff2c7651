"""The Mamba-2 core (convolution, scan, gated norm) on a GPU: our Triton kernels beside mamba_ssm's, checked against fp64, timed and tuned.

    python -m benchmarks.mamba_block                      # check, then time; needs a GPU; mamba_ssm if it is to be compared
    python -m benchmarks.mamba_block --only 8b --tune     # try launch parameters of every kernel at one shape

Prints one JSON object per line. A check gives the relative l2 distance of outputs and gradients from `mamba_core` in fp64 on the same bf16
inputs, and says whether all are within the bounds. A timing gives the median milliseconds of forward, and forward + backward, of ours and
of `mamba_split_conv1d_scan_combined`, called eagerly and, as a training step would, replayed from a CUDA graph; their ratio; and the time
of each of our kernels alone. Tuning prints a line per kernel and launch parameters, fastest first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor
from triton.testing import do_bench

from megatron_hybrid.ops.mamba_core import mamba_core as mamba_core_torch, projection_sizes
from megatron_hybrid.ops.triton import conv1d, launch as launches, norm, ssd, ssd_steps
from megatron_hybrid.ops.triton.mamba_core import mamba_core

EPS = 1e-5
# one rounding to bf16 is 1.1e-3 in l2; y passes three (states, mixing, result) before the norm, gradients twice as many
OUTPUT_BOUND, GRADIENT_BOUND = 5e-3, 1e-2


@dataclass(frozen=True)
class Shape:
    """A Mamba-2 core, as one GPU sees it."""

    batch: int
    length: int
    heads: int
    head_dim: int
    groups: int
    state: int

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        return self.inner + 2 * self.groups * self.state


@dataclass(frozen=True)
class Launches:
    """The launch parameters of all kernels."""

    scan: launches.ScanLaunch
    conv: launches.ConvLaunch
    norm: launches.NormLaunch

    @classmethod
    def pinned(cls, shape: Shape) -> Launches:
        scan = launches.scan_launch(torch.bfloat16, shape.head_dim, shape.state)
        return cls(scan, launches.CONV_LAUNCH, launches.norm_launch(shape.inner // shape.groups))


SHAPES: Mapping[str, Shape] = {
    "8b": Shape(1, 8192, 128, 64, 8, 128),
    "nano-4b": Shape(1, 4096, 96, 80, 8, 128),
    "56b": Shape(1, 8192, 256, 64, 8, 256),
    "one-group": Shape(1, 8192, 32, 64, 1, 256),
    "odd-length": Shape(2, 1037, 16, 64, 2, 128),
}
# the shapes that are also checked with documents
DOCUMENTS = ("8b", "odd-length")


def random_inputs(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Inputs as in a model that has trained a while: dt around 0.001 to 0.1, decays from -1 to -16."""
    generator = torch.Generator("cuda").manual_seed(0)
    random = partial(torch.randn, device="cuda", generator=generator)
    return {
        "zxBCdt_LBE": random(shape.length, shape.batch, shape.inner + shape.channels + shape.heads).to(dtype),
        "conv_weight_CW": random(shape.channels, 4).mul(0.5).to(dtype),
        "conv_bias_C": random(shape.channels).mul(0.1).to(dtype),
        "A_log_H": torch.rand(shape.heads, device="cuda", generator=generator).mul(15).add(1).log(),
        "D_H": random(shape.heads),
        "dt_bias_H": random(shape.heads).sub(4),
        "norm_weight_I": random(shape.inner).mul(0.1).add(1).to(dtype),
    }


def run(operation: Callable, inputs: Mapping[str, Tensor], **options: object) -> dict[str, Tensor]:
    """The output, and every input's gradient under a fixed cotangent, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    out = operation(**leaves, **options)
    cotangent = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(torch.bfloat16).to(out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


def distances(actual: Mapping[str, Tensor], exact: Mapping[str, Tensor], sizes: list[int]) -> dict[str, float]:
    """Relative l2 distance by name; the projection's gradient in its three parts."""

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).norm() / b.double().norm())

    by_name = {name: distance(actual[name], exact[name]) for name in exact if name != "zxBCdt_LBE"}
    parts = (tensor["zxBCdt_LBE"].split(sizes, dim=-1) for tensor in (actual, exact))
    return by_name | {name: distance(a, b) for name, a, b in zip(("z", "xBC", "dt"), *parts, strict=True)}


def check(name: str, shape: Shape, *, with_documents: bool) -> None:
    inputs, sizes = random_inputs(shape), [shape.inner, shape.channels, shape.heads]
    documents = (torch.rand(shape.batch, shape.length, device="cuda") < 4 / shape.length).cumsum(1)
    for segment_ids in (None, documents)[: 1 + with_documents]:
        options = {"num_groups": shape.groups, "eps": EPS, "segment_ids_BL": segment_ids}
        actual = run(mamba_core, inputs, **options)
        repeat = run(mamba_core, inputs, **options)
        exact = run(mamba_core_torch, {key: tensor.double() for key, tensor in inputs.items()}, **options)
        found = distances(actual, exact, sizes)
        within = all(value <= (OUTPUT_BOUND if key == "out" else GRADIENT_BOUND) for key, value in found.items())
        same = all(torch.equal(actual[key], repeat[key]) for key in actual)
        line = {"check": name, "documents": segment_ids is not None, "within_bounds": within, "repeats_bitwise": same}
        print(json.dumps(line | {key: float(f"{value:.2e}") for key, value in found.items()}), flush=True)
        del actual, repeat, exact


def check_long() -> None:
    """Rows of 65,536 positions in a batch of two: offsets pass 2^31. The last document alone must give the same bits."""
    shape, last = Shape(2, 65536, 128, 64, 8, 128), 4096
    inputs = random_inputs(shape)
    documents = torch.zeros(shape.batch, shape.length, dtype=torch.int32, device="cuda")
    documents[:, -last:] = 1
    tail = inputs | {"zxBCdt_LBE": inputs["zxBCdt_LBE"][-last:]}
    cotangent = torch.randn(last, shape.batch, shape.inner, device="cuda", dtype=torch.bfloat16)
    results = []
    for given, segment_ids in ((inputs, documents), (tail, documents[:, -last:])):
        leaf = given["zxBCdt_LBE"].detach().requires_grad_()
        out = mamba_core(**(given | {"zxBCdt_LBE": leaf}), num_groups=shape.groups, eps=EPS, segment_ids_BL=segment_ids)
        (gradient,) = torch.autograd.grad(out[-last:], leaf, cotangent)
        results.append({"out": out[-last:].detach(), "zxBCdt_LBE": gradient[-last:].clone()})
        del leaf, out, gradient
    whole, alone = results
    found = distances(whole, alone, [shape.inner, shape.channels, shape.heads])
    print(json.dumps({"check": "64k tokens", "equal": all(torch.equal(whole[key], alone[key]) for key in whole)} | found), flush=True)


def peer(shape: Shape, inputs: Mapping[str, Tensor]) -> Callable[[], Tensor] | None:
    """mamba_ssm's fused core on the same numbers, batch first as it wants them; None where it is not installed."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined
    except ImportError:
        return None
    zxBCdt_BLE = inputs["zxBCdt_LBE"].detach().transpose(0, 1).contiguous().requires_grad_()
    rest = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items() if name != "zxBCdt_LBE"}

    def forward() -> Tensor:
        return mamba_split_conv1d_scan_combined(
            zxBCdt_BLE,
            rest["conv_weight_CW"],
            rest["conv_bias_C"],
            rest["dt_bias_H"],
            -torch.exp(rest["A_log_H"]),
            rest["D_H"],
            128,
            activation="silu",
            rmsnorm_weight=rest["norm_weight_I"],
            rmsnorm_eps=EPS,
            headdim=shape.head_dim,
            ngroups=shape.groups,
            norm_before_gate=False,
        )

    forward.leaves = [zxBCdt_BLE, *rest.values()]
    return forward


def ours(shape: Shape, inputs: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}

    def forward() -> Tensor:
        return mamba_core(**leaves, num_groups=shape.groups, eps=EPS)

    forward.leaves = list(leaves.values())
    return forward


def times_ms(forward: Callable[[], Tensor]) -> dict[str, float]:
    """Median times of forward and of forward + backward, called and replayed."""
    with torch.no_grad():
        cotangent = torch.randn_like(forward())

    def both() -> None:
        torch.autograd.grad(forward(), forward.leaves, cotangent)

    named = {}
    for name, step in (("forward", forward), ("both", both)):
        named[name] = do_bench(step, warmup=30, rep=100, return_mode="median")
        named[f"{name}_graph"] = do_bench(captured(step).replay, warmup=30, rep=100, return_mode="median")
    return named


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


class Kernels:
    """Each kernel of the core alone, on inputs of one shape."""

    def __init__(self, shape: Shape) -> None:
        inputs = random_inputs(shape)
        self.weight, self.bias, self.norm_weight = (inputs[name] for name in ("conv_weight_CW", "conv_bias_C", "norm_weight_I"))
        self.sizes, conv_sizes = projection_sizes(inputs["zxBCdt_LBE"].shape[-1], shape.channels, shape.heads, shape.inner, shape.groups)
        self.z, self.xBC, dt = inputs["zxBCdt_LBE"].transpose(0, 1).split(self.sizes, dim=-1)
        self.gradient = torch.empty_like(inputs["zxBCdt_LBE"])
        self.dz, self.dxBC, ddt = self.gradient.transpose(0, 1).split(self.sizes, dim=-1)
        self.convolved, self.dconvolved = (torch.empty_like(self.xBC) for _ in range(2))
        conv1d.conv_forward(self.xBC, self.weight, self.bias, None, None, self.convolved)
        x, B, C = self.convolved.split(conv_sizes, dim=-1)
        dx, dB, dC = self.dconvolved.split(conv_sizes, dim=-1)
        heads, groups = (shape.heads, -1), (shape.groups, -1)
        A_log, D, dt_bias = (inputs[name] for name in ("A_log_H", "D_H", "dt_bias_H"))
        self.scan = ssd_steps.Scan(
            x.unflatten(-1, heads), dt, A_log, B.unflatten(-1, groups), C.unflatten(-1, groups), D, dt_bias, None, None
        )
        self.gradients = ssd.ScanGradients(dx.unflatten(-1, heads), ddt, dB.unflatten(-1, groups), dC.unflatten(-1, groups))
        self.y, self.dy, self.out = (torch.randn_like(x) for _ in range(3))
        self.num_groups = shape.groups
        self.y_BLHP, self.dy_BLHP = self.y.unflatten(-1, heads), self.dy.unflatten(-1, heads)

    def steps(self, chosen: Launches) -> dict[str, Callable[[], object]]:
        """Every kernel under these launch parameters, ready to call."""
        scan, gradients, launch = self.scan, self.gradients, chosen.scan
        forward, backward = (ssd_steps.decays_of(scan, length) for length in (launch.forward_chunk, launch.backward_chunk))
        walk = partial(ssd_steps.walk, scan.x_BLHP, scan.B_BLGN)
        before, _ = walk(forward.into_BSHK, forward.total_BSH, None, launch.forward_walk)
        states, _ = walk(backward.into_BSHK, backward.total_BSH, None, launch.backward_walk)
        back = partial(
            ssd_steps.walk_back, self.dy_BLHP, scan.C_BLGN, backward.out_BSHK, backward.total_BSH, None, states, launch.backward_walk
        )
        dstates, _, across = back()
        source = partial(
            ssd_steps.source_gradients,
            scan,
            self.dy_BLHP,
            dstates,
            backward,
            gradients.dx_BLHP,
            across.new_empty(across.shape[:-1]),
            launch.source_gradient,
        )
        dscores, at_target, at_source = source()
        dB = partial(
            ssd_steps.key_gradients, scan.x_BLHP, scan.B_BLGN, scan.C_BLGN, dstates, dscores, backward.into_BSHK, gradients.dB_BLGN
        )
        dC = partial(ssd_steps.key_gradients, self.dy_BLHP, scan.C_BLGN, scan.B_BLGN, states, dscores, backward.out_BSHK, gradients.dC_BLGN)
        norm_inputs = (self.y, self.z, self.norm_weight, self.num_groups, EPS)
        products = (at_target, at_source, torch.empty_like(at_source), torch.empty_like(at_source), across)
        return {
            "conv": partial(conv1d.conv_forward, self.xBC, self.weight, self.bias, None, None, self.convolved, chosen.conv),
            "decays": partial(ssd_steps.decays_of, scan, launch.forward_chunk),
            "walk": partial(walk, forward.into_BSHK, forward.total_BSH, None, launch.forward_walk),
            "outputs": partial(ssd_steps.outputs, scan, forward, before, self.y_BLHP, launch.output),
            "norm": partial(norm.norm_forward, *norm_inputs, self.out, chosen.norm),
            "norm backward": partial(norm.norm_backward, *norm_inputs, self.out, self.dy.clone(), self.dz, chosen.norm),
            "walk again": partial(walk, backward.into_BSHK, backward.total_BSH, None, launch.backward_walk),
            "walk back": back,
            "source gradients": source,
            "gradient of B": partial(dB, launch.key_gradient, of_targets=False),
            "gradient of C": partial(dC, launch.key_gradient, of_targets=True),
            "decay gradients": partial(
                ssd_steps.decay_gradients,
                scan,
                *products,
                gradients.ddt_raw_BLH,
                across.new_empty(across.shape[:-1]),
                across.new_empty(across.shape[:-1]),
            ),
            "conv backward": partial(
                conv1d.conv_backward, self.xBC, self.weight, self.bias, None, None, self.dconvolved, self.dxBC, chosen.conv
            ),
        }


def time_shape(name: str, shape: Shape) -> None:
    inputs = random_inputs(shape)
    line: dict[str, object] = {"time": name, **asdict(shape), "gpu": torch.cuda.get_device_name()}
    mine = times_ms(ours(shape, inputs))
    line["ours_ms"] = mine
    stock = peer(shape, inputs)
    if stock is not None:
        line["mamba_ssm_ms"] = theirs = times_ms(stock)
        line["ratio"] = {key: theirs[key] / mine[key] for key in mine}
    del inputs, stock
    kernels = Kernels(shape)
    steps = kernels.steps(Launches.pinned(shape))
    line["kernels_ms"] = {key: do_bench(captured(step).replay, warmup=5, rep=20, return_mode="median") for key, step in steps.items()}
    print(json.dumps(rounded(line)), flush=True)


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def candidates(shape: Shape) -> Iterator[tuple[str, Launches]]:
    """A kernel of `Kernels.steps` and the launch parameters to try it with; those that stand are among them."""
    base = Launches.pinned(shape)
    block_n = launches.block_size(shape.state)

    def scan(**changes: object) -> Launches:
        return replace(base, scan=replace(base.scan, **changes))

    for p, n, warps, stages in itertools.product((16, 32, 64), sorted({64, min(128, block_n)}), (2, 4), (3, 4)):
        walk = launches.WalkLaunch(p, n, warps, stages)
        yield "walk", scan(forward_chunk=128, forward_walk=walk)
        for chunk in (64, 128):
            yield "walk back", scan(backward_chunk=chunk, backward_walk=walk)
    for chunk, block_l, warps, stages in (
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (128, 64, 4, 2),
        (128, 64, 4, 3),
        (128, 64, 8, 2),
        (128, 128, 8, 2),
    ):
        for heads in (8, 16):
            yield "outputs", scan(forward_chunk=chunk, output=launches.OutputLaunch(block_l, heads, warps, stages))
    for chunk, tile, warps, stages in (
        (64, 64, 4, 1),
        (64, 64, 4, 2),
        (64, 64, 8, 1),
        (64, 64, 8, 2),
        (64, 32, 4, 2),
        (64, 32, 8, 2),
        (128, 64, 8, 1),
        (128, 64, 8, 2),
        (128, 32, 8, 2),
    ):
        yield "source gradients", scan(backward_chunk=chunk, source_gradient=launches.SourceLaunch(tile, warps, stages))
    for chunk, warps, stages in ((64, 4, 2), (64, 4, 3), (64, 4, 4), (128, 8, 2), (128, 8, 3), (128, 4, 2)):
        yield "gradient of B", scan(backward_chunk=chunk, key_gradient=launches.ProductLaunch(warps, stages))
    for rows, tiles, warps in ((1, 8, 4), (1, 16, 2), (1, 16, 4), (1, 32, 2), (1, 32, 4), (2, 16, 4), (2, 8, 8)):
        for kernel in ("norm", "norm backward"):
            yield kernel, replace(base, norm=launches.NormLaunch(rows, tiles, warps))
    for block_c, tiles, tile, warps in (
        (512, 8, 8, 4),
        (512, 16, 4, 4),
        (512, 16, 8, 4),
        (256, 8, 8, 2),
        (1024, 16, 4, 8),
        (1024, 8, 8, 4),
        (1024, 16, 4, 4),
    ):
        for kernel in ("conv", "conv backward"):
            yield kernel, replace(base, conv=launches.ConvLaunch(block_c, tiles, tile, warps))


def compile_in_parallel(shapes: Mapping[str, Shape], num_workers: int) -> None:
    """Fill Triton's cache on disk with the kernels of all shapes."""
    cases = [(shape, documents) for name, shape in shapes.items() for documents in ((False, True) if name in DOCUMENTS else (False,))]
    with worker_pool(num_workers) as pool:
        list(pool.map(run_short, *zip(*cases, strict=True)))


def run_short(shape: Shape, documents: bool) -> None:
    shape = replace(shape, length=256)
    segment_ids = torch.zeros(shape.batch, shape.length, dtype=torch.int64, device="cuda") if documents else None
    run(mamba_core, random_inputs(shape), num_groups=shape.groups, eps=EPS, segment_ids_BL=segment_ids)


def worker_pool(num_workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn"))


def try_candidate(shape: Shape, name: str, chosen: Launches) -> str | None:
    """Compile and run once; the error if it does not."""
    try:
        Kernels(replace(shape, length=2 * chosen.scan.forward_chunk)).steps(chosen)[name]()
        torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler or the device says about these parameters
        return f"{type(error).__name__}: {error}"[:120]
    return None


def options_of(kernel: str, chosen: Launches) -> dict[str, int]:
    """The launch parameters that concern this kernel."""
    if kernel in ("norm", "norm backward"):
        return asdict(chosen.norm)
    if kernel in ("conv", "conv backward"):
        return asdict(chosen.conv)
    field = {"walk": "forward_walk", "walk back": "backward_walk", "outputs": "output", "source gradients": "source_gradient"}
    chunk = chosen.scan.forward_chunk if kernel in ("walk", "outputs") else chosen.scan.backward_chunk
    return {"chunk": chunk} | asdict(getattr(chosen.scan, field.get(kernel, "key_gradient")))


def tune(name: str, shape: Shape, num_workers: int, only: str | None) -> None:
    """Compile all candidates in parallel into Triton's cache on disk, then time them one by one."""
    tried = [(kernel, chosen) for kernel, chosen in candidates(shape) if only in (None, kernel)]
    with worker_pool(num_workers) as pool:
        errors = list(pool.map(partial(try_candidate, shape), *zip(*tried, strict=True)))
    kernels = Kernels(shape)
    results: dict[str, list] = {}
    for (kernel, chosen), error in zip(tried, errors, strict=True):
        try:
            step = kernels.steps(chosen)[kernel]
            time = error or round(do_bench(captured(step).replay, warmup=3, rep=10, return_mode="median"), 4)
        except Exception as failure:  # out of resources at the full size only
            time = f"{type(failure).__name__}: {failure}"[:120]
        results.setdefault(kernel, []).append((time, options_of(kernel, chosen)))
    for kernel, rows in results.items():
        rows.sort(key=lambda row: (isinstance(row[0], str), str(row[0])))
        for time, options in rows:
            print(json.dumps({"tune": name, "kernel": kernel, "ms": time, **options}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SHAPES, help="this shape only")
    parser.add_argument("--no-check", action="store_true", help="time without checking first")
    parser.add_argument("--no-time", action="store_true", help="check only")
    parser.add_argument("--tune", action="store_true", help="try launch parameters in place of checking and timing")
    parser.add_argument("--kernel", help="with --tune: this kernel only, by its name in the timings")
    parser.add_argument("--workers", type=int, default=16, help="processes that compile")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("these kernels need a CUDA device, and torch sees none")
    shapes = {arguments.only: SHAPES[arguments.only]} if arguments.only else SHAPES
    if arguments.tune:
        for name, shape in shapes.items() if arguments.only else [("8b", SHAPES["8b"])]:
            tune(name, shape, arguments.workers, arguments.kernel)
        return
    compile_in_parallel(shapes, arguments.workers)
    if not arguments.no_check:
        for name, shape in shapes.items():
            check(name, shape, with_documents=name in DOCUMENTS)
        check_long()
    if not arguments.no_time:
        for name, shape in shapes.items():
            time_shape(name, shape)


if __name__ == "__main__":
    main()
