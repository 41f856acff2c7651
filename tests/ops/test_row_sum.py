"""Gradients that kernels leave in parts."""

from __future__ import annotations

import pytest
import torch

from megatron_hybrid.ops.triton.row_sum import gradient_from_parts


@pytest.mark.parametrize("shape", [(5,), (70,), (33, 4), (33, 1, 4)], ids=str)
@pytest.mark.parametrize("num_parts", [1, 64, 131])
def test_parts_add_up_to_the_gradient_or_into_the_buffer(device: str, shape: tuple[int, ...], num_parts: int) -> None:
    weight = torch.zeros(shape, dtype=torch.bfloat16, device=device, requires_grad=True)
    # as a kernel leaves them: more rows than are asked for
    parts_XAB = torch.randn(num_parts, (shape[-1] if len(shape) > 1 else 1) + 1, shape[0], device=device)[:, :-1]
    expected = parts_XAB.double().sum(0).t().reshape(shape)
    plain = gradient_from_parts(weight, parts_XAB)
    assert plain.dtype == torch.bfloat16
    torch.testing.assert_close(plain.double(), expected, rtol=1e-2, atol=1e-2)
    # main_grad stands in a buffer of all weights
    weight.main_grad = torch.ones(7 + weight.numel(), device=device)[7:].view(shape)
    for _ in range(2):
        placeholder = gradient_from_parts(weight, parts_XAB)
    assert placeholder.shape == weight.shape and placeholder.dtype == weight.dtype
    assert weight.grad_added_to_main_grad
    torch.testing.assert_close(weight.main_grad.double(), 1 + 2 * expected, rtol=1e-5, atol=1e-4)
