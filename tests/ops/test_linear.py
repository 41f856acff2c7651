from __future__ import annotations

import pytest
import torch

from megatron_hybrid.ops.linear import linear, linear_reference
from tests.ops.comparison import assert_equivalent


@pytest.mark.parametrize("shape", [(7, 3, 5, 11), (1, 1, 16, 4), (32, 2, 48, 96)], ids=str)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_equals_the_specification(shape: tuple[int, int, int, int], dtype: torch.dtype, bound: float) -> None:
    """fp32 stays full precision on every route: its bound is far below what bf16 or TF32 products would leave."""
    length, batch, num_inputs, num_outputs = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(length, batch, num_inputs, generator=generator).to(dtype)
    weight = torch.randn(num_outputs, num_inputs, generator=generator).to(dtype)
    assert_equivalent(linear, linear_reference, {"x": x, "weight_OI": weight}, bound)
    assert_equivalent(linear, linear_reference, {"x": x.transpose(0, 1), "weight_OI": weight}, bound)


def test_weight_gradient_is_contiguous() -> None:
    """Gradients are added into flat buffers and all-reduced: a transposed one would be copied each time."""
    for num_inputs, num_outputs in ((8, 32), (32, 8)):
        weight = torch.randn(num_outputs, num_inputs, requires_grad=True)
        (gradient,) = torch.autograd.grad(linear(torch.randn(5, num_inputs), weight).sum(), weight)
        assert gradient.is_contiguous()
