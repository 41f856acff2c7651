"""The cast to float8, against arithmetic, over every bf16 number."""

from __future__ import annotations

import pytest
import torch

from megatron_hybrid.fp8.formats import E4M3, E5M2, Float8Format, quantize, quantize_reference

FORMATS = pytest.mark.parametrize("to", [E4M3, E5M2], ids=["e4m3", "e5m2"])
ONE = torch.tensor(1.0)


@pytest.fixture(scope="module")
def every_bf16() -> torch.Tensor:
    return torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)


@FORMATS
@pytest.mark.parametrize("scale", [1.0, 0.75, 3e-3, 12345.0])
def test_cast_is_the_specification_for_every_bf16_number(to: Float8Format, scale: float, every_bf16: torch.Tensor) -> None:
    cast = quantize(every_bf16, torch.tensor(scale), to)
    assert cast.dtype == to.dtype
    torch.testing.assert_close(cast.float(), quantize_reference(every_bf16, torch.tensor(scale), to), rtol=0, atol=0, equal_nan=True)


@FORMATS
def test_every_float8_number_is_its_own_cast(to: Float8Format) -> None:
    numbers = torch.arange(2**8).to(torch.uint8).view(to.dtype).float()
    numbers = numbers[numbers.isfinite()]
    assert numbers.max() == to.largest and numbers[numbers > 0].min() == to.smallest_subnormal
    assert torch.equal(quantize(numbers, ONE, to).float(), numbers)


@FORMATS
def test_large_values_saturate_and_nan_stays(to: Float8Format) -> None:
    values = torch.tensor([to.largest * 1.01, 1e30, float("inf"), -float("inf"), float("nan")])
    cast = quantize(values, ONE, to).float()
    assert cast[:4].tolist() == [to.largest, to.largest, to.largest, -to.largest]
    assert cast[4].isnan()


@FORMATS
def test_half_the_smallest_number_and_less_is_flushed(to: Float8Format) -> None:
    half = to.smallest_subnormal / 2
    values = torch.tensor([half, half * (1 + 2**-20), half * 0.99, -half, half / 1e6])
    assert quantize(values, ONE, to).float().tolist() == [0, to.smallest_subnormal, 0, 0, 0]


@FORMATS
def test_halves_round_to_even(to: Float8Format) -> None:
    step = 2.0**-to.num_mantissa_bits
    values = 1 + step * torch.tensor([0.5, 1.5, 2.5])
    assert quantize(values, ONE, to).float().tolist() == [1.0, 1 + 2 * step, 1 + 2 * step]
