from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.ops.distillation import linear_kl_divergence, linear_kl_divergence_reference
from tests.ops.comparison import assert_equivalent, relative_difference, results_and_gradients
from tests.ops.test_cross_entropy import join_ranks

VOCAB_SIZE, PADDED_SIZE = 37, 48
# A rank of four holds 12 rows: the last one 1 word and 11 rows of padding.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def make_inputs(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What gets gradients, and the rest; the teacher is wider than the student."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    inputs = {"hidden": draw(7, 3, 16), "weight_VD": draw(PADDED_SIZE, 16)}
    token_weights = torch.rand(7, 3, generator=generator).mul(2).sub(0.5).relu()
    return inputs, {"teacher_hidden": draw(7, 3, 24), "teacher_weight_VE": draw(PADDED_SIZE, 24), "token_weights": token_weights}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("num_rows_per_chunk", [1, 8, 512])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_the_specification(dtype: torch.dtype, num_rows_per_chunk: int, temperature: float) -> None:
    inputs, others = make_inputs(dtype)
    options = {**others, "vocab_size": VOCAB_SIZE, "temperature": temperature}
    chunked = functools.partial(linear_kl_divergence, num_rows_per_chunk=num_rows_per_chunk)
    assert_equivalent(chunked, linear_kl_divergence_reference, inputs, BOUNDS[dtype], **options)
    of_tokens, expected = chunked(**inputs, **options)[1], linear_kl_divergence_reference(**inputs, **options)[1]
    assert relative_difference(of_tokens, expected) < BOUNDS[dtype] and not of_tokens.requires_grad


def test_specification_is_torchs_own_divergence() -> None:
    inputs, others = make_inputs(torch.float64)
    student, teacher = (
        (hidden @ weight.t())[..., :VOCAB_SIZE].log_softmax(-1)
        for hidden, weight in (tuple(inputs.values()), (others["teacher_hidden"], others["teacher_weight_VE"]))
    )
    expected = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(linear_kl_divergence_reference(**inputs, **others, vocab_size=VOCAB_SIZE)[1], expected)


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient() -> None:
    inputs, others = make_inputs(torch.float64)
    same = {**others, "teacher_hidden": inputs["hidden"], "teacher_weight_VE": inputs["weight_VD"], "vocab_size": VOCAB_SIZE}
    named = results_and_gradients(linear_kl_divergence, inputs, same)
    assert all(value.abs().max() < 1e-12 for value in named.values())


def test_padding_rows_and_the_teacher_get_no_gradient() -> None:
    inputs, others = make_inputs(torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in (inputs | others).items() if name != "token_weights"}
    total, _ = linear_kl_divergence(**leaves, token_weights=others["token_weights"], vocab_size=VOCAB_SIZE)
    total.backward()
    assert not leaves["weight_VD"].grad[VOCAB_SIZE:].any() and leaves["weight_VD"].grad[:VOCAB_SIZE].any()
    assert leaves["teacher_hidden"].grad is None and leaves["teacher_weight_VE"].grad is None


def test_large_logits_stay_finite() -> None:
    inputs, others = make_inputs(torch.float32)
    inputs["hidden"] *= 1e4
    named = results_and_gradients(linear_kl_divergence, inputs, {**others, "vocab_size": VOCAB_SIZE})
    assert all(torch.isfinite(value).all() for value in named.values())


@pytest.mark.parametrize("operation", [linear_kl_divergence, linear_kl_divergence_reference])
def test_bad_arguments_are_refused(operation) -> None:
    inputs, others = make_inputs(torch.float32)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        operation(**inputs, **others, vocab_size=VOCAB_SIZE, temperature=0.0)


def test_other_vocabularies_are_refused() -> None:
    inputs, others = make_inputs(torch.float32)
    others["teacher_weight_VE"] = others["teacher_weight_VE"][:40]
    with pytest.raises(ValueError, match="holds 48 and 40 rows"):
        linear_kl_divergence(**inputs, **others, vocab_size=VOCAB_SIZE)


def sharded_results(dtype: torch.dtype) -> dict[str, Tensor]:
    """On every rank: loss, and gradients as the undivided operation would give them."""
    group, (inputs, others) = join_ranks(), make_inputs(dtype)
    own = {**inputs, "weight_VD": inputs["weight_VD"].chunk(group.size())[group.rank()]}
    options = {**others, "teacher_weight_VE": others["teacher_weight_VE"].chunk(group.size())[group.rank()]}
    options |= {"vocab_size": VOCAB_SIZE, "group": group, "temperature": 1.5}
    chunked = functools.partial(linear_kl_divergence, num_rows_per_chunk=8)
    named, repeated = (results_and_gradients(chunked, own, options) for _ in range(2))
    assert all(torch.equal(named[name], repeated[name]) for name in named)
    dist.all_reduce(named["gradient of hidden"])
    shards = [torch.empty_like(named["gradient of weight_VD"]) for _ in range(group.size())]
    dist.all_gather(shards, named["gradient of weight_VD"].contiguous())
    return named | {"gradient of weight_VD": torch.cat(shards)}


@pytest.mark.parametrize("dtype, world_size", [(torch.float64, 2), (torch.bfloat16, 2), (torch.float32, 4)], ids=str)
def test_sharded_vocabulary_equals_the_undivided_one(dtype: torch.dtype, world_size: int, run_ranks) -> None:
    inputs, others = make_inputs(dtype)
    expected = results_and_gradients(linear_kl_divergence_reference, inputs, {**others, "vocab_size": VOCAB_SIZE, "temperature": 1.5})
    for results in run_ranks(sharded_results, world_size, dtype):
        for name, reference in expected.items():
            assert relative_difference(results[name], reference) < BOUNDS[dtype], name
