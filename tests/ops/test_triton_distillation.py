"""The Triton distillation loss is its specification, forward and backward, whole and divided."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.ops.distillation import linear_kl_divergence_reference
from megatron_hybrid.ops.triton import distillation
from megatron_hybrid.ops.triton.distillation import linear_kl_divergence
from tests.ops.comparison import assert_equivalent, relative_difference, results_and_gradients
from tests.ops.test_cross_entropy import join_ranks
from tests.ops.test_distillation import VOCAB_SIZE, make_inputs

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_the_specification(device: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, temperature: float) -> None:
    # Several blocks to a row, the last of them with words and padding.
    monkeypatch.setattr(distillation, "_BLOCK_V", 8)
    inputs, others = ({name: tensor.to(device) for name, tensor in part.items()} for part in make_inputs(dtype))
    options = {**others, "vocab_size": VOCAB_SIZE, "temperature": temperature}
    chunked = functools.partial(linear_kl_divergence, num_rows_per_chunk=8)
    assert_equivalent(chunked, linear_kl_divergence_reference, inputs, BOUNDS[dtype], **options)
    of_tokens, expected = chunked(**inputs, **options)[1], linear_kl_divergence_reference(**inputs, **options)[1]
    assert relative_difference(of_tokens, expected) < BOUNDS[dtype] and not of_tokens.requires_grad


def test_the_weights_gradient_goes_to_its_buffer(device: str) -> None:
    inputs, others = ({name: tensor.to(device) for name, tensor in part.items()} for part in make_inputs(torch.float32))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    leaves["weight_VD"].main_grad = torch.ones_like(inputs["weight_VD"])
    total, _ = linear_kl_divergence(**leaves, **others, vocab_size=VOCAB_SIZE)
    total.backward()
    reference = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    linear_kl_divergence_reference(**reference, **others, vocab_size=VOCAB_SIZE)[0].backward()
    assert relative_difference(leaves["weight_VD"].main_grad - 1, reference["weight_VD"].grad) < 1e-4
    assert leaves["weight_VD"].grad_added_to_main_grad


def sharded_results() -> dict[str, Tensor]:
    """On every rank: loss, and gradients as the undivided operation would give them."""
    group, (inputs, others) = join_ranks(), make_inputs(torch.float32)
    own = {**inputs, "weight_VD": inputs["weight_VD"].chunk(group.size())[group.rank()]}
    options = {**others, "teacher_weight_VE": others["teacher_weight_VE"].chunk(group.size())[group.rank()]}
    named = results_and_gradients(linear_kl_divergence, own, options | {"vocab_size": VOCAB_SIZE, "group": group, "temperature": 1.5})
    dist.all_reduce(named["gradient of hidden"])
    shards = [torch.empty_like(named["gradient of weight_VD"]) for _ in range(group.size())]
    dist.all_gather(shards, named["gradient of weight_VD"].contiguous())
    return named | {"gradient of weight_VD": torch.cat(shards)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks' tensors are on the CPU, in Triton's interpreter")
def test_sharded_vocabulary_equals_the_undivided_one(run_ranks) -> None:
    inputs, others = make_inputs(torch.float32)
    expected = results_and_gradients(linear_kl_divergence_reference, inputs, {**others, "vocab_size": VOCAB_SIZE, "temperature": 1.5})
    for results in run_ranks(sharded_results, 4):
        for name, reference in expected.items():
            assert relative_difference(results[name], reference) < 1e-5, name
