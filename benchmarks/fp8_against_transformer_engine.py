"""Our float8 linear beside Transformer Engine's, same inputs: are scales and amax histories the same bit for bit, and how far are results?

    python -m benchmarks.fp8_against_transformer_engine

Over 50 steps the magnitudes of inputs, weights and gradients drift by a few powers of two. Prints a JSON line per recipe: in how many steps
histories and scales were equal in every bit, and the largest relative l2 distance of output, input gradient and weight gradient. Both
multiply through cuBLASLt; where results differ it is the order of sums.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec

import torch

from megatron_hybrid.config import DelayedScalingConfig, Fp8Config
from megatron_hybrid.fp8.backends import make_backend
from megatron_hybrid.fp8.linear import Float8Linear
from megatron_hybrid.fp8.state import ScalingState
from megatron_hybrid.ops.linear_accumulating import linear_cublas

TOKENS, INPUTS, OUTPUTS, STEPS, HISTORY = 512, 1024, 768, 50, 16


def make_linear(recipe: str) -> Float8Linear:
    delayed = DelayedScalingConfig(history_length=HISTORY) if recipe == "delayed" else DelayedScalingConfig()
    config = Fp8Config(recipe=recipe, delayed=delayed)
    return Float8Linear("linear", config, make_backend("transformer_engine"), linear_cublas).cuda()


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def compare(recipe: str) -> dict[str, object]:
    # Here, so that --help and what is missing can be said without it.
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling, Format

    torch.manual_seed(0)
    ours = make_linear(recipe)
    state = ScalingState([ours]) if recipe == "delayed" else None
    theirs = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.bfloat16, device="cuda")
    te_recipe = (
        DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=HISTORY, amax_compute_algo="max")
        if recipe == "delayed"
        else Float8CurrentScaling(fp8_format=Format.HYBRID)
    )
    equal, distances = 0, {"output": [], "input_gradient": [], "weight_gradient": []}
    for step in range(STEPS):
        magnitude = 2.0 ** (step % 7 - 3)
        x = (torch.randn(TOKENS, INPUTS, device="cuda") * magnitude).bfloat16().requires_grad_()
        dy = (torch.randn(TOKENS, OUTPUTS, device="cuda") * 2.0 ** (step % 11 - 8)).bfloat16()
        weight = (torch.randn(OUTPUTS, INPUTS, device="cuda") * 0.02 * (1 + step / 10)).bfloat16().requires_grad_()
        with torch.no_grad():
            theirs.weight.copy_(weight)
        y = ours(x, weight)
        own = y, *torch.autograd.grad(y, (x, weight), dy)
        with te.fp8_autocast(enabled=True, fp8_recipe=te_recipe):
            y = theirs(x)
        y.backward(dy)
        for of_name, mine, peer in zip(distances.values(), own, (y, x.grad, theirs.weight.grad), strict=True):
            of_name.append(distance(mine, peer))
        x.grad = theirs.weight.grad = None
        if state is not None:
            state.advance()
            forward, backward = theirs.fp8_meta["scaling_fwd"], theirs.fp8_meta["scaling_bwd"]
            histories = torch.cat((forward.amax_history[:, :2], backward.amax_history[:, :1]), 1).t()
            scales = torch.cat((forward.scale[:2], backward.scale[:1]))
            equal += torch.equal(ours.amax_history_RH, histories) and torch.equal(ours.scale_R, scales)
    # Of tensors, because Python's own max passes over NaN.
    largest = {name: torch.tensor(values).max().item() for name, values in distances.items()}
    report = {"recipe": recipe, "steps": STEPS, "gpu": torch.cuda.get_device_name(), "largest_l2_distance": largest}
    return report | ({"steps_with_equal_histories_and_scales": equal} if recipe == "delayed" else {})


def main() -> None:
    """Print one JSON line per recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fp8_against_transformer_engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    if find_spec("transformer_engine") is None:
        parser.error("it compares with Transformer Engine, which is not installed; docs/kernels.md says how to install the extra gpu")
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here, and float8 products need one")
    for recipe in ("delayed", "current"):
        print(json.dumps(compare(recipe)), flush=True)


if __name__ == "__main__":
    main()
