"""The fused output layer and loss in Triton: natively on a GPU, in Triton's interpreter on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from megatron_hybrid.ops.cross_entropy import linear_cross_entropy_reference
from megatron_hybrid.ops.triton.cross_entropy import linear_cross_entropy

VOCABULARY, ROWS, HIDDEN = 47, 50, 16


def make_inputs(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 3, HIDDEN, generator=generator)
    weight = torch.randn(ROWS, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCABULARY, (10, 3), generator=generator)
    token_weights = torch.rand(10, 3, generator=generator)
    return hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(), labels.to(device), token_weights.to(device)


@pytest.mark.parametrize("rows_per_chunk", [8, 30, 64])
def test_loss_and_gradients_are_the_specification(device: str, rows_per_chunk: int) -> None:
    hidden, weight, labels, token_weights = make_inputs(device)
    expected, losses = linear_cross_entropy_reference(hidden, weight, labels, token_weights, vocab_size=VOCABULARY)
    total, own_losses = linear_cross_entropy(
        hidden, weight, labels, token_weights, vocab_size=VOCABULARY, num_rows_per_chunk=rows_per_chunk
    )
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(own_losses, losses)
    for ours, theirs in zip(
        torch.autograd.grad(3 * total, (hidden, weight)), torch.autograd.grad(3 * expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_weight_with_a_buffer_takes_its_gradient_there(device: str) -> None:
    hidden, weight, labels, token_weights = make_inputs(device)
    (expected,) = torch.autograd.grad(
        linear_cross_entropy_reference(hidden, weight, labels, token_weights, vocab_size=VOCABULARY)[0], weight
    )
    weight.main_grad = torch.ones_like(weight)
    for _ in range(2):
        linear_cross_entropy(hidden, weight, labels, token_weights, vocab_size=VOCABULARY)[0].backward()
        weight.grad = None
    torch.testing.assert_close(weight.main_grad, 1 + 2 * expected, rtol=1e-4, atol=1e-5)
    assert weight.grad_added_to_main_grad


def test_a_scaled_sum_is_refused_where_the_buffer_already_has_the_gradient() -> None:
    hidden, weight, labels, token_weights = make_inputs("cpu")
    weight.main_grad = torch.zeros_like(weight)
    total, _ = linear_cross_entropy(hidden, weight, labels, token_weights, vocab_size=VOCABULARY)
    with pytest.raises(RuntimeError, match="must enter the backward pass with gradient 1"):
        (2 * total).backward()


def test_padding_rows_get_no_gradient(device: str) -> None:
    hidden, weight, labels, token_weights = make_inputs(device)
    linear_cross_entropy(hidden, weight, labels, token_weights, vocab_size=VOCABULARY)[0].backward()
    assert not weight.grad[VOCABULARY:].any() and weight.grad[:VOCABULARY].any()


def test_without_gradients_nothing_is_kept(device: str) -> None:
    inputs = make_inputs(device)
    inputs[1].main_grad = torch.zeros_like(inputs[1])
    with torch.no_grad():
        total, _ = linear_cross_entropy(*inputs, vocab_size=VOCABULARY)
    assert total.grad_fn is None and not inputs[1].main_grad.any()
    torch.testing.assert_close(total, linear_cross_entropy_reference(*inputs, vocab_size=VOCABULARY)[0].detach())


def run_divided() -> tuple[Tensor, ...]:
    """One of two ranks: loss, this rank's summand of the hidden gradient, its rows of the weight's."""
    on_gpus = torch.cuda.device_count() > 1
    distributed.init_process_group("nccl" if on_gpus else "gloo")
    try:
        hidden, weight, labels, token_weights = make_inputs(f"cuda:{distributed.get_rank()}" if on_gpus else "cpu")
        shard = weight.detach().chunk(2)[distributed.get_rank()].clone().requires_grad_()
        total, _ = linear_cross_entropy(
            hidden, shard, labels, token_weights, vocab_size=VOCABULARY, group=distributed.group.WORLD, num_rows_per_chunk=8
        )
        return tuple(tensor.detach().cpu() for tensor in (total, *torch.autograd.grad(total, (hidden, shard))))
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="compiled kernels need a GPU for each of the two ranks")
def test_a_divided_vocabulary_gives_the_same(run_ranks: Any) -> None:
    hidden, weight, labels, token_weights = make_inputs("cpu")
    expected, _ = linear_cross_entropy_reference(hidden, weight, labels, token_weights, vocab_size=VOCABULARY)
    dhidden, dweight = torch.autograd.grad(expected, (hidden, weight))
    (first, first_dhidden, first_dweight), (second, second_dhidden, second_dweight) = run_ranks(run_divided, 2)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected.detach())
    torch.testing.assert_close(first_dhidden + second_dhidden, dhidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat((first_dweight, second_dweight)), dweight, rtol=1e-4, atol=1e-5)
