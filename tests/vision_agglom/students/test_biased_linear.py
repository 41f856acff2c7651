"""The GPU's linear with bias is torch's, whether or not the weight's gradient goes where the data-parallel wrapper keeps it."""

from __future__ import annotations

import pytest
import torch

from vision_agglom.students.biased_linear import biased_linear


@pytest.mark.parametrize("keeps_gradient", [False, True])
def test_value_and_gradients(keeps_gradient: bool) -> None:
    torch.manual_seed(0)
    # Not contiguous, as attention's output comes.
    x = torch.randn(3, 5, 6).transpose(0, 1).requires_grad_()
    weight, bias = torch.randn(4, 6).requires_grad_(), torch.randn(4).requires_grad_()
    dy = torch.randn(5, 3, 4)
    expected = torch.nn.functional.linear(x, weight, bias)
    gradients = torch.autograd.grad(expected, (x, weight, bias), dy)
    before = torch.randn(4, 6)
    if keeps_gradient:
        weight.main_grad = before.clone()
    value = biased_linear(x, weight, bias)
    torch.testing.assert_close(value, expected)
    dx, dweight, dbias = torch.autograd.grad(value, (x, weight, bias), dy)
    torch.testing.assert_close((dx, dbias), (gradients[0], gradients[2]))
    if keeps_gradient:
        assert weight.grad_added_to_main_grad
        torch.testing.assert_close(weight.main_grad - before, gradients[1], rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(dweight, gradients[1])
