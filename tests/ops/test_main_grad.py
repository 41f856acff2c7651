"""Weight gradients that products add to the data-parallel wrapper's buffer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_hybrid.ops.embedding import embedding_reference
from megatron_hybrid.ops.linear_accumulating import linear_cublas, linear_cublaslt
from megatron_hybrid.ops.main_grad import mark_added
from megatron_hybrid.ops.triton.embedding import embedding


def linear_case(device: str, linear: Callable = linear_cublas) -> tuple[Callable, Callable, torch.Tensor]:
    # bf16 numbers, so that a bf16 product rounds nothing but its result
    x = torch.randn(3, 5, 8, device=device).bfloat16().float()
    return (
        lambda weight: linear(x.to(weight.dtype), weight),
        lambda weight: x.to(weight.dtype) @ weight.t(),
        torch.randn(6, 8, device=device),
    )


def cublaslt_case(device: str) -> tuple[Callable, Callable, torch.Tensor]:
    return linear_case(device, linear_cublaslt)


def embedding_case(device: str) -> tuple[Callable, Callable, torch.Tensor]:
    # ids of other ranks on both sides, and one that comes often
    tokens = torch.randint(0, 40, (3, 11), device=device)
    tokens[0, :7] = 12
    return (
        lambda weight: embedding(weight, tokens, 10),
        lambda weight: embedding_reference(weight, tokens, 10),
        torch.randn(20, 48, device=device),
    )


@pytest.mark.parametrize("case", [linear_case, cublaslt_case, embedding_case])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_autograds_and_add_up_in_fp32(device: str, dtype: torch.dtype, case: Callable) -> None:
    if device == "cpu" and (case is cublaslt_case or (case is linear_case and dtype == torch.bfloat16)):
        pytest.skip("cuBLASLt's products, and torch's of bf16 matrices into fp32, are CUDA's alone")
    ours, reference, weight = case(device)
    weight = weight.to(dtype).requires_grad_()
    y = ours(weight)
    torch.testing.assert_close(y, reference(weight))
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(reference(weight.float()), weight, dy.float()) if dtype == torch.float32 else [None]
    if expected is None:
        wide = weight.detach().float().requires_grad_()
        (expected,) = torch.autograd.grad(reference(wide), wide, dy.float())
    (plain,) = torch.autograd.grad(ours(weight), weight, dy)
    torch.testing.assert_close(plain.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
    for _ in range(3):
        ours(weight).backward(dy)
        weight.grad = None
    torch.testing.assert_close(weight.main_grad, 1 + 3 * expected, rtol=1e-5, atol=1e-4)
    assert weight.grad_added_to_main_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_placeholder_costs_no_memory(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 8, dtype=dtype)
    weight.main_grad = torch.zeros(6, 8)
    placeholder = mark_added(weight)
    assert placeholder.shape == weight.shape and placeholder.dtype == dtype
    assert placeholder.untyped_storage().data_ptr() == weight.main_grad.untyped_storage().data_ptr()
