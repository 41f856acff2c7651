from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from megatron_hybrid.ops.norm import gated_rms_norm, gated_rms_norm_reference, rms_norm, rms_norm_reference
from tests.ops.comparison import assert_equivalent

EPS = 1e-5
PRECISIONS = pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)


def random(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@PRECISIONS
@pytest.mark.parametrize("transposed", [False, True], ids=["dense", "transposed"])
def test_rms_norm_equals_the_specification(dtype: torch.dtype, bound: float, transposed: bool) -> None:
    x = random(0, 9, 4, 24, dtype=dtype)
    inputs = {"x": x.transpose(0, 1) if transposed else x, "weight_D": random(1, 24, dtype=dtype)}
    assert_equivalent(functools.partial(rms_norm, eps=EPS), functools.partial(rms_norm_reference, eps=EPS), inputs, bound)


@PRECISIONS
@pytest.mark.parametrize("num_groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True], ids=["dense", "transposed"])
def test_gated_rms_norm_equals_the_specification(dtype: torch.dtype, bound: float, num_groups: int, transposed: bool) -> None:
    y, gate = random(0, 9, 4, 48, dtype=dtype), random(1, 9, 4, 60, dtype=dtype)[..., 6:54]
    if transposed:
        y, gate = y.transpose(0, 1), gate.transpose(0, 1)
    inputs = {"y": y, "gate": gate, "weight_D": random(2, 48, dtype=dtype)}
    options = {"num_groups": num_groups, "eps": EPS}
    assert_equivalent(functools.partial(gated_rms_norm, **options), functools.partial(gated_rms_norm_reference, **options), inputs, bound)


def test_gradients_match_finite_differences() -> None:
    shapes = [(3, 2, 6), (3, 2, 6), (6,)]
    y, gate, weight = (random(seed, *shape, dtype=torch.float64).requires_grad_() for seed, shape in enumerate(shapes))
    assert torch.autograd.gradcheck(lambda *tensors: rms_norm(*tensors, EPS), (y, weight))
    assert torch.autograd.gradcheck(lambda *tensors: gated_rms_norm(*tensors, 3, EPS), (y, gate, weight))


def test_gate_comes_before_the_norm() -> None:
    """Scaling the gated product of a whole group changes nothing: the statistics are taken behind the gate, group by group."""
    y, gate, weight = random(0, 5, 12, dtype=torch.float64), random(1, 5, 12, dtype=torch.float64), torch.ones(12, dtype=torch.float64)
    scaled = y.clone()
    scaled[:, :6] *= 7
    for norm in (gated_rms_norm_reference, gated_rms_norm):
        torch.testing.assert_close(norm(scaled, gate, weight, 2, 0.0), norm(y, gate, weight, 2, 0.0))
        assert not torch.allclose(norm(scaled, gate, weight, 1, 0.0), norm(y, gate, weight, 1, 0.0))


def test_rows_of_zeros_stay_finite() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y = rms_norm(x, torch.ones(8), EPS)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros(2, 8)) and torch.isfinite(gradient).all()


def test_channels_that_do_not_divide_are_refused() -> None:
    for norm in (gated_rms_norm_reference, gated_rms_norm):
        with pytest.raises(ValueError, match="10 channels do not divide into 4 norm groups"):
            norm(torch.zeros(2, 10), torch.zeros(2, 10), torch.zeros(10), 4, EPS)
