from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from megatron_hybrid.ops.attention import attention_reference, attention_sdpa, document_mask
from megatron_hybrid.ops.attention_blocked import attention_blocked
from tests.ops.comparison import assert_equivalent, relative_difference, results_and_gradients

# several blocks at these lengths, the last one short
small_blocks = functools.partial(attention_blocked, num_queries_per_block=8)
FAST = pytest.mark.parametrize("attention", [attention_sdpa, small_blocks, attention_blocked], ids=["sdpa", "small blocks", "blocked"])
PRECISIONS = pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)


def make_inputs(
    *, queries: int = 33, keys: int = 33, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)

    def random(length: int, num_heads: int) -> Tensor:
        return torch.randn(length, 2, num_heads, 16, dtype=torch.float64, generator=generator).to(dtype).transpose(0, 1)

    return {"q_BLHP": random(queries, heads), "k_BSJP": random(keys, kv_heads), "v_BSJP": random(keys, kv_heads)}


@FAST
@PRECISIONS
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [33, 5, 1])
def test_equals_the_specification(attention, dtype: torch.dtype, bound: float, kv_heads: int, queries: int) -> None:
    """All queries, the last few against a cache, and one decoding step."""
    assert_equivalent(attention, attention_reference, make_inputs(queries=queries, kv_heads=kv_heads, dtype=dtype), bound)


@FAST
@PRECISIONS
def test_equals_the_specification_within_documents(attention, dtype: torch.dtype, bound: float) -> None:
    segment_ids = (torch.rand(2, 33, generator=torch.Generator().manual_seed(0)) < 0.2).cumsum(1) % 3
    assert_equivalent(attention, attention_reference, make_inputs(dtype=dtype), bound, mask_B1LS=document_mask(segment_ids))


@FAST
def test_documents_equal_separate_runs(attention) -> None:
    inputs = make_inputs(queries=20, keys=20)
    mask = document_mask(torch.tensor([[0] * 7 + [4] * 6 + [0] * 7] * 2))
    packed = results_and_gradients(functools.partial(attention, mask_B1LS=mask), inputs, {})

    def separately(**tensors: Tensor) -> Tensor:
        documents = [{name: tensor[:, start:end] for name, tensor in tensors.items()} for start, end in ((0, 7), (7, 13), (13, 20))]
        return torch.cat([attention(**document) for document in documents], dim=1)

    separate = results_and_gradients(separately, inputs, {})
    for name, expected in separate.items():
        assert relative_difference(packed[name], expected) < 1e-12, name


@FAST
def test_nothing_leaks_between_documents(attention) -> None:
    inputs = make_inputs(queries=12, keys=12, dtype=torch.float32)
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    for tensor in changed.values():
        tensor[:, :6] *= -3
    options = {"mask_B1LS": document_mask(torch.tensor([[0] * 6 + [1] * 6] * 2))}
    before, after = (results_and_gradients(attention, each, options) for each in (inputs, changed))
    for name in before:
        assert torch.equal(before[name][:, 6:], after[name][:, 6:]), name
        assert not torch.equal(before[name][:, :6], after[name][:, :6]), name


@FAST
def test_decoding_step_by_step_equals_the_whole_run(attention) -> None:
    inputs = make_inputs(queries=9, keys=9)
    whole = attention(**inputs)
    for t in range(9):
        step = attention(inputs["q_BLHP"][:, t : t + 1], inputs["k_BSJP"][:, : t + 1], inputs["v_BSJP"][:, : t + 1])
        assert relative_difference(step, whole[:, t : t + 1]) < 1e-12


def test_bad_shapes_are_refused() -> None:
    for operation in (attention_blocked, attention_sdpa, attention_reference):
        with pytest.raises(ValueError, match="4 query heads cannot share 3 key/value heads"):
            operation(**make_inputs(kv_heads=3))
        with pytest.raises(ValueError, match="5 queries but only 3 keys"):
            operation(**make_inputs(queries=5, keys=3))


def test_gradients_match_finite_differences() -> None:
    inputs = make_inputs(queries=3, keys=5, heads=2, kv_heads=1)
    blocked = functools.partial(attention_blocked, num_queries_per_block=2)
    assert torch.autograd.gradcheck(blocked, tuple(tensor.requires_grad_() for tensor in inputs.values()))


def test_large_scores_stay_finite() -> None:
    inputs = {name: tensor * 1e3 for name, tensor in make_inputs(dtype=torch.float32).items()}
    assert all(torch.isfinite(tensor).all() for tensor in results_and_gradients(attention_blocked, inputs, {}).values())
