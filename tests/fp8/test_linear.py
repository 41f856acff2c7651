"""The float8 linear: its products, and when amaxes are recorded and scales change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_hybrid.config import DelayedScalingConfig, Fp8Config
from megatron_hybrid.fp8.backends import (
    Backend,
    Product,
    amax_plain,
    cast_plain,
    choose_implementation,
    emulated_product,
    scaled_mm_product,
    scales_plain,
)
from megatron_hybrid.fp8.formats import E4M3, E5M2
from megatron_hybrid.fp8.linear import Float8Linear
from megatron_hybrid.fp8.reference import float8_linear_reference
from megatron_hybrid.fp8.statistics import describe_statistics
from megatron_hybrid.ops.linear import linear

ROWS, INPUTS, OUTPUTS = 32, 48, 64


def make_linear(product: Product = emulated_product, **options: Any) -> Float8Linear:
    recipe = Fp8Config(**{"recipe": "delayed", "delayed": DelayedScalingConfig(history_length=3), **options})
    return Float8Linear("decoder.layers.0.mlp.linear_fc1", recipe, Backend(cast_plain, amax_plain, scales_plain, product), linear)


def make_tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and gradient of the output, each with a spread of magnitudes that reaches both ends of the formats."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, ROWS // 2, INPUTS), (OUTPUTS, INPUTS), (2, ROWS // 2, OUTPUTS)
    x, weight, dy = (torch.randn(shape, generator=generator) * 10 ** (3 * torch.randn(shape, generator=generator)) for shape in shapes)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), dy.to(dtype)


def run_linear(module: Float8Linear, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = module(x, weight)
    return y, *torch.autograd.grad(y, (x, weight), dy)


@pytest.mark.parametrize("product", [emulated_product, scaled_mm_product])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fp8_format", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_products_are_the_specification(recipe: str, fp8_format: str, dtype: torch.dtype, product: Product) -> None:
    module = make_linear(product, recipe=recipe, format=fp8_format, delayed=DelayedScalingConfig())
    tensors = make_tensors(dtype=dtype)
    formats = (E4M3, E4M3, E5M2 if fp8_format == "hybrid" else E4M3)
    if recipe == "delayed":
        module.set_scales(torch.tensor([0.01, 3.0, 70.0]))
        scales = tuple(module.scale_R)
    else:
        scales = tuple(torch.tensor(to.largest) / tensor.detach().float().abs().max() for tensor, to in zip(tensors, formats, strict=True))
    x, weight, dy = (tensor.detach().flatten(0, -2) for tensor in tensors)
    for ours, expected in zip(run_linear(module, *tensors), float8_linear_reference(x, weight, dy, scales, formats), strict=True):
        assert ours.dtype == dtype
        scale_of_rounding = 1e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(
            ours.flatten(0, -2).double(), expected, rtol=scale_of_rounding, atol=scale_of_rounding * expected.abs().max().item()
        )


def test_amaxes_gather_by_max_over_micro_batches_and_scales_stay() -> None:
    module = make_linear()
    expected = torch.zeros(3)
    for seed in range(3):
        tensors = make_tensors(seed)
        run_linear(module, *tensors)
        expected = torch.maximum(expected, torch.stack([tensor.detach().abs().max() for tensor in tensors]))
        assert torch.equal(module.scale_R, torch.ones(3))
    assert torch.equal(module.amax_history_RH[:, 0], expected)
    assert not module.amax_history_RH[:, 1:].any()


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_recomputation_changes_nothing(recipe: str) -> None:
    plain, recomputed = (make_linear(recipe=recipe, delayed=DelayedScalingConfig()) for _ in range(2))
    x, weight, dy = make_tensors()
    for module in (plain, recomputed):
        module.observe(torch.device("cpu"))
    expected = run_linear(plain, x, weight, dy)
    y = checkpoint(recomputed, x, weight, use_reentrant=True)
    torch.autograd.backward(y, dy)
    for ours, theirs in zip((y, x.grad, weight.grad), expected, strict=True):
        assert torch.equal(ours, theirs)
    for name, buffer in plain.named_buffers():
        assert torch.equal(recomputed.get_buffer(name), buffer), name
    for ours_S, theirs_S in zip(recomputed.statistics_RS, plain.statistics_RS, strict=True):
        assert describe_statistics(ours_S) == describe_statistics(theirs_S)


def test_eval_mode_uses_scales_and_records_nothing() -> None:
    module = make_linear().eval()
    module.set_scales(torch.tensor([0.01, 3.0, 70.0]))
    tensors = make_tensors()
    expected = run_linear(module.train(), *tensors)
    module.amax_history_RH.zero_()
    for ours, theirs in zip(run_linear(module.eval(), *tensors), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not module.amax_history_RH.any()


def test_disabled_it_is_the_exact_linear() -> None:
    module = make_linear()
    module.enabled = False
    x, weight, _ = make_tensors()
    assert torch.equal(module(x, weight), linear(x, weight))
    assert not module.amax_history_RH.any()


def test_what_is_kept_for_backward_is_float8() -> None:
    kept: list[Tensor] = []
    x, weight, _ = make_tensors()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        make_linear()(x, weight)
    # The weight is there anyway.
    assert sum(tensor.nbytes for tensor in kept if tensor.data_ptr() != weight.data_ptr()) == x.numel() + weight.numel() + 2 * 4


def test_a_zero_tensor_stays_zero_under_current_scaling() -> None:
    x, weight, dy = make_tensors()
    y, dx, dweight = run_linear(
        make_linear(recipe="current", delayed=DelayedScalingConfig()), torch.zeros_like(x).requires_grad_(), weight, dy
    )
    assert not y.any() and not dweight.any() and dx.isfinite().all() and dx.any()


def test_statistics_count_both_ends() -> None:
    module = make_linear()
    module.observe(torch.device("cpu"))
    x = torch.full((16, 16), 1.0)
    x[0, :4] = 1000.0  # saturates
    x[1, :8] = 2.0**-11  # flushed
    x[2, :2] = 0.0  # was zero before
    x[3, 0] = 460.0  # only rounds
    weight = torch.eye(16)
    module(x, weight)
    assert describe_statistics(module.statistics_RS[0]) == {"amax": 1000.0, "scale": 1.0, "saturated": 4 / 256, "flushed": 8 / 256}
    module.set_scales(torch.tensor([0.3, 1.0, 1.0]))
    module(torch.full((16, 16), float("inf")), weight)
    described = describe_statistics(module.statistics_RS[0])
    assert described == {"amax": None, "scale": torch.tensor(0.3).item(), "saturated": 260 / 512, "flushed": 8 / 512}
    assert describe_statistics(module.statistics_RS[2])["scale"] is None, "no gradient was cast"


def test_current_scaling_saturates_nothing() -> None:
    module = make_linear(recipe="current", delayed=DelayedScalingConfig())
    module.observe(torch.device("cpu"))
    for seed in range(20):
        run_linear(module, *make_tensors(seed))
    assert [describe_statistics(statistics_S)["saturated"] for statistics_S in module.statistics_RS] == [0, 0, 0]


def test_products_agree_on_transposed_operands() -> None:
    a = torch.randn(48, 32).to(torch.float8_e5m2).t()
    b = torch.randn(48, 64).to(torch.float8_e4m3fn).t()
    inverses = torch.tensor(0.5), torch.tensor(3.0)
    ours, theirs = (product(a, b, *inverses, out_dtype=torch.float32, fast=False) for product in (emulated_product, scaled_mm_product))
    torch.testing.assert_close(ours, theirs)


def test_float8_that_nothing_implements_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert choose_implementation("auto", cpu) == "emulated"
    with pytest.raises(ValueError, match="scaled_mm needs a GPU"):
        choose_implementation("scaled_mm", cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match=r"A100 \(compute capability 8.0\) has no float8 products.*8.9.*'fp8={recipe: off}'"):
        choose_implementation("auto", gpu)
    assert choose_implementation("emulated", gpu) == "emulated"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert choose_implementation("auto", gpu) == "cublaslt"
