from __future__ import annotations

import pytest
import torch

from megatron_hybrid.ops.activation import squared_relu, squared_relu_reference
from tests.ops.comparison import assert_equivalent


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)], ids=str)
def test_equals_the_specification(dtype: torch.dtype, bound: float) -> None:
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    x[0] = 0
    assert_equivalent(squared_relu, squared_relu_reference, {"x": x}, bound)


def test_gradient_matches_finite_differences() -> None:
    x = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(squared_relu, x)


def test_keeps_only_its_result() -> None:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        y = squared_relu(torch.randn(8, requires_grad=True))
    assert saved == [y.data_ptr()]
