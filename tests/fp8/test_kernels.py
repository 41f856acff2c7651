"""The Triton casts are the specification bit for bit: natively on a GPU, in Triton's interpreter on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.fp8 import kernels
from megatron_hybrid.fp8.backends import amax_plain, cast_plain, emulated_product, make_backend, scales_plain
from megatron_hybrid.fp8.formats import E4M3, E5M2, Float8Format
from megatron_hybrid.fp8.scaling import new_scale
from megatron_hybrid.ops.installed import has_transformer_engine


def make_inputs(dtype: torch.dtype, device: str, shape: tuple[int, int] = (72, 144)) -> tuple[Tensor, Tensor]:
    """Magnitudes that reach both ends of the formats, in a shape that fills no tile."""
    generator = torch.Generator().manual_seed(0)
    x_MK = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-14, 3, shape, generator=generator).float())
    return x_MK.to(dtype).to(device), torch.randn(shape, generator=generator).to(dtype).to(device)


@pytest.mark.parametrize("prologue", ["none", "squared_relu", "squared_relu_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("to", [E4M3, E5M2], ids=["e4m3", "e5m2"])
# the layout of the tiles in registers follows what divides the sizes
@pytest.mark.parametrize("shape", [(72, 144), (1000, 1040), (256, 512)], ids=str)
def test_casts_and_amaxes_are_the_specification(
    shape: tuple[int, int], to: Float8Format, dtype: torch.dtype, prologue: Any, device: str
) -> None:
    x_MK, other_MK = make_inputs(dtype, device, shape)
    scale = torch.tensor(to.largest / 3, device=device)
    options = dict(prologue=prologue, other_MK=other_MK, rows=True, columns=True, into=None)
    amax, expected_amax = torch.zeros((), device=device), torch.zeros((), device=device)
    rows_MK, columns_KM = kernels.cast(x_MK, scale, to, amax=amax, **options)
    expected_MK, _ = cast_plain(x_MK, scale, to, amax=expected_amax, **options)
    assert columns_KM.is_contiguous() and torch.equal(columns_KM.float(), rows_MK.float().t())
    assert torch.equal(rows_MK.view(torch.uint8), expected_MK.view(torch.uint8))
    assert torch.equal(amax, expected_amax) and torch.equal(kernels.amax(x_MK, prologue=prologue, other_MK=other_MK), expected_amax)


def test_amaxes_gather_and_outputs_may_be_given(device: str) -> None:
    x_MK, _ = make_inputs(torch.float32, device)
    amax, scale = torch.tensor(100.0, device=device), torch.ones((), device=device)
    into = torch.empty_like(x_MK, dtype=E4M3.dtype), torch.empty_like(x_MK.t().contiguous(), dtype=E4M3.dtype)
    assert kernels.cast(x_MK, scale, E4M3, amax=amax, into=into) == into and amax == 100
    assert torch.equal(into[0].float(), kernels.cast(x_MK, scale, E4M3, columns=False)[0].float())
    assert torch.equal(into[1].float(), kernels.cast(x_MK, scale, E4M3, rows=False)[1].float())


@pytest.mark.parametrize("amax", [3.0, 0.0, float("inf"), 1e-45, 448.0])
def test_scales_are_the_specification(amax: float, device: str) -> None:
    value = torch.tensor(amax, device=device)
    for ours, expected in zip(kernels.scales(value, E4M3), scales_plain(value, E4M3), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float8 tensor cores")
@pytest.mark.parametrize("implementation", ["scaled_mm", "cublaslt", "transformer_engine"])
@pytest.mark.parametrize("a_format", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("fast", [False, True])
def test_products_on_tensor_cores_are_the_emulation(implementation: str, a_format: Float8Format, fast: bool) -> None:
    if implementation == "transformer_engine" and not has_transformer_engine():
        pytest.skip("Transformer Engine is not installed")
    product = make_backend(implementation).product
    a, b = torch.randn(160, 1040, device="cuda").to(a_format.dtype), torch.randn(208, 1040, device="cuda").to(E4M3.dtype)
    # 16 bytes apart, as histories keep them
    inverse_a, inverse_b = torch.tensor([[0.5, 0, 0, 0], [0.25, 0, 0, 0]], device="cuda")[:, 0]
    exact = emulated_product(a, b, inverse_a, inverse_b, out_dtype=torch.float32, fast=fast)
    # the tensor cores sum float8 products in some 14 bits, along all of K if fast, else along 128 at a time
    bound = 2e-3 if fast else 5e-4
    close = dict(rtol=bound, atol=bound * float(exact.abs().max()))
    torch.testing.assert_close(product(a, b, inverse_a, inverse_b, out_dtype=torch.float32, fast=fast), exact, **close)
    half = product(a, b, inverse_a, inverse_b, out_dtype=torch.bfloat16, fast=fast)
    torch.testing.assert_close(half.float(), exact, rtol=1e-2, atol=bound * float(exact.abs().max()))
    total = torch.ones_like(exact)
    assert product(a, b, inverse_a, inverse_b, out_dtype=torch.bfloat16, fast=fast, add_to=total) is total
    torch.testing.assert_close(total, 1 + exact, **close)


def test_infinities_saturate_and_nan_stays(device: str) -> None:
    x_MK = torch.zeros(16, 16, device=device)
    x_MK[0, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    rows_MK, _ = kernels.cast(x_MK, torch.ones((), device=device), E4M3)
    assert rows_MK[0, 0].item() == 448 and rows_MK[0, 1].item() == -448 and rows_MK[0, 2].isnan()


@pytest.mark.parametrize("prologue", ["none", "squared_relu", "squared_relu_backward"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_amax_that_is_not_finite_keeps_the_scale(value: float, prologue: Any, device: str) -> None:
    """In kernel and specification alike, under delayed and current scaling."""
    x_MK, other_MK = make_inputs(torch.float32, device)
    x_MK[3, 5], other_MK[3, 5] = value, 1.0
    if prologue == "squared_relu":
        x_MK[3, 5] = abs(value)
    options = dict(prologue=prologue, other_MK=other_MK)
    previous = torch.tensor(3.0, device=device)
    for backend_cast, backend_amax, backend_scales in (
        (kernels.cast, kernels.amax, kernels.scales),
        (cast_plain, amax_plain, scales_plain),
    ):
        recorded = torch.tensor(2.0, device=device)
        backend_cast(x_MK, previous, E4M3, amax=recorded, rows=True, columns=True, into=None, **options)
        assert recorded == float("inf") and backend_amax(x_MK, **options) == float("inf")
        assert new_scale(recorded, previous, E4M3.largest) == previous
        assert [each.item() for each in backend_scales(recorded, E4M3)] == [1, 1]
