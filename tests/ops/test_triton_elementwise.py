"""The Triton norms and squared ReLU are their specifications, forward and backward."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from megatron_hybrid.ops.activation import squared_relu_reference
from megatron_hybrid.ops.norm import gated_rms_norm_reference, rms_norm_reference
from megatron_hybrid.ops.triton.activation import squared_relu
from megatron_hybrid.ops.triton.norm import gated_rms_norm, rms_norm
from tests.ops.comparison import assert_near_fp64

EPS = 1e-5
# bf16: one rounding of each result, 1.1e-3 in l2
PRECISIONS = pytest.mark.parametrize("dtype, bounds", [(torch.float32, (1e-6, 1e-6)), (torch.bfloat16, (3e-3, 3e-3))], ids=str)


@pytest.fixture
def random(device: str):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device, dtype)

    return draw


@PRECISIONS
@pytest.mark.parametrize("transposed", [False, True], ids=["dense", "transposed"])
def test_rms_norm_equals_the_specification(random, dtype: torch.dtype, bounds: tuple, transposed: bool) -> None:
    x = random(9, 4, 24, dtype=dtype)
    inputs = {"x": x.transpose(0, 1) if transposed else x, "weight_D": random(24, dtype=dtype)}
    assert_near_fp64(functools.partial(rms_norm, eps=EPS), functools.partial(rms_norm_reference, eps=EPS), inputs, bounds)


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 2, 24)], ids=str)
def test_rms_norm_takes_any_number_of_axes(random, shape: tuple[int, ...]) -> None:
    inputs = {"x": random(*shape, dtype=torch.float32), "weight_D": random(24, dtype=torch.float32)}
    assert_near_fp64(functools.partial(rms_norm, eps=EPS), functools.partial(rms_norm_reference, eps=EPS), inputs, (1e-6, 1e-6))


@PRECISIONS
@pytest.mark.parametrize("num_groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True], ids=["dense", "transposed"])
def test_gated_rms_norm_equals_the_specification(random, dtype: torch.dtype, bounds: tuple, num_groups: int, transposed: bool) -> None:
    y, gate = random(9, 4, 48, dtype=dtype), random(9, 4, 60, dtype=dtype)[..., 6:54]
    if transposed:
        y, gate = y.transpose(0, 1), gate.transpose(0, 1)
    inputs, options = {"y": y, "gate": gate, "weight_D": random(48, dtype=dtype)}, {"num_groups": num_groups, "eps": EPS}
    assert_near_fp64(functools.partial(gated_rms_norm, **options), functools.partial(gated_rms_norm_reference, **options), inputs, bounds)


def test_many_rows_are_summed_over_several_programs(random) -> None:
    inputs = {"x": random(300, 700, dtype=torch.float32), "weight_D": random(700, dtype=torch.float32)}
    assert_near_fp64(functools.partial(rms_norm, eps=EPS), functools.partial(rms_norm_reference, eps=EPS), inputs, (1e-6, 1e-6))


def test_rows_of_zeros_stay_finite(device: str) -> None:
    x = torch.zeros(2, 8, device=device, requires_grad=True)
    y = rms_norm(x, torch.ones(8, device=device), EPS)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros_like(x)) and torch.isfinite(gradient).all()


def test_channels_that_do_not_divide_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="10 channels do not divide into 4 norm groups"):
        gated_rms_norm(torch.zeros(2, 10, device=device), torch.zeros(2, 10, device=device), torch.zeros(10, device=device), 4, EPS)


@PRECISIONS
def test_squared_relu_equals_the_specification(random, dtype: torch.dtype, bounds: tuple) -> None:
    x = random(64, 70, dtype=dtype).mul(3)
    x[0] = 0
    assert_near_fp64(squared_relu, squared_relu_reference, {"x": x}, bounds)
    assert_near_fp64(squared_relu, squared_relu_reference, {"x": x.t()}, bounds)


def test_squared_relu_keeps_only_its_result(device: str) -> None:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        y = squared_relu(torch.randn(8, requires_grad=True, device=device))
    assert saved == [y.data_ptr()]
