from __future__ import annotations

import functools
import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.ops.cross_entropy import cross_entropy_reference, linear_cross_entropy, linear_cross_entropy_reference
from megatron_hybrid.substrate.place import place_from_environment
from megatron_hybrid.substrate.rendezvous import open_store
from tests.ops.comparison import assert_equivalent, relative_difference, results_and_gradients

VOCAB_SIZE, PADDED_SIZE = 37, 48
# A rank of four holds 12 rows: the last one 1 word and 11 rows of padding.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make_inputs(dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 3, 16, dtype=torch.float64, generator=generator).to(dtype)
    weight_VD = torch.randn(PADDED_SIZE, 16, dtype=torch.float64, generator=generator).to(dtype)
    labels = torch.randint(VOCAB_SIZE, (7, 3), generator=generator)
    labels[0] = torch.tensor([0, VOCAB_SIZE - 1, 12])
    return {"hidden": hidden, "weight_VD": weight_VD}, labels


def token_weights(labels: Tensor) -> Tensor:
    return torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)).mul(2).sub(0.5).relu()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("num_rows_per_chunk", [1, 8, 512])
def test_equals_the_specification(dtype: torch.dtype, num_rows_per_chunk: int) -> None:
    inputs, labels = make_inputs(dtype)
    options = {"labels": labels, "token_weights": token_weights(labels), "vocab_size": VOCAB_SIZE}
    fused = functools.partial(linear_cross_entropy, num_rows_per_chunk=num_rows_per_chunk)
    assert_equivalent(fused, linear_cross_entropy_reference, inputs, BOUNDS[dtype], **options)
    losses, expected = fused(**inputs, **options)[1], linear_cross_entropy_reference(**inputs, **options)[1]
    assert relative_difference(losses, expected) < BOUNDS[dtype]


def test_padding_rows_get_no_probability_and_no_gradient() -> None:
    inputs, labels = make_inputs(torch.float32)
    inputs["weight_VD"][VOCAB_SIZE:] = 1e4
    options = {"labels": labels, "token_weights": torch.ones(7, 3), "vocab_size": VOCAB_SIZE}
    cut = inputs | {"weight_VD": inputs["weight_VD"][:VOCAB_SIZE]}
    for operation in (linear_cross_entropy, linear_cross_entropy_reference):
        named, expected = results_and_gradients(operation, inputs, options), results_and_gradients(operation, cut, options)
        torch.testing.assert_close(named["result 0"], expected["result 0"])
        assert not named["gradient of weight_VD"][VOCAB_SIZE:].any()


def test_equal_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    inputs, labels = make_inputs(torch.float32)
    inputs["hidden"].zero_()
    for operation in (linear_cross_entropy, linear_cross_entropy_reference):
        _, losses = operation(**inputs, labels=labels, token_weights=torch.ones(7, 3), vocab_size=VOCAB_SIZE)
        torch.testing.assert_close(losses, torch.full((7, 3), float(VOCAB_SIZE)).log())


def test_large_logits_stay_finite() -> None:
    inputs, labels = make_inputs(torch.float32)
    inputs["hidden"] *= 1e4
    options = {"labels": labels, "vocab_size": VOCAB_SIZE, "token_weights": torch.ones(7, 3)}
    assert all(torch.isfinite(tensor).all() for tensor in results_and_gradients(linear_cross_entropy, inputs, options).values())


def test_without_gradients_it_forms_none() -> None:
    inputs, labels = make_inputs(torch.float32)
    options = {"labels": labels, "token_weights": torch.ones(7, 3), "vocab_size": VOCAB_SIZE}
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    expected = linear_cross_entropy(**leaves, **options)
    with torch.no_grad():
        total, losses = linear_cross_entropy(**leaves, **options)
    assert not total.requires_grad and torch.equal(total, expected[0]) and torch.equal(losses, expected[1])


@pytest.mark.parametrize("label", [-1, VOCAB_SIZE])
def test_labels_outside_the_vocabulary_are_refused(label: int) -> None:
    inputs, labels = make_inputs(torch.float32)
    labels[3, 1] = label
    for operation in (linear_cross_entropy, linear_cross_entropy_reference):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 37\)"):
            operation(**inputs, labels=labels, token_weights=torch.ones(7, 3), vocab_size=VOCAB_SIZE)


def join_ranks() -> dist.ProcessGroup:
    place = place_from_environment(os.environ)
    dist.init_process_group("gloo", store=open_store(place, 60.0), rank=place.rank, world_size=place.world_size)
    return dist.group.WORLD


def sharded_results(dtype: torch.dtype) -> dict[str, Tensor]:
    """On every rank: losses, and gradients as the undivided operation would give them (hidden's summed, the weight's gathered)."""
    group, (inputs, labels) = join_ranks(), make_inputs(dtype)
    shard_VD = inputs["weight_VD"].chunk(group.size())[group.rank()]
    options = {"labels": labels, "vocab_size": VOCAB_SIZE, "group": group, "token_weights": token_weights(labels)}
    sharded, inputs = functools.partial(linear_cross_entropy, num_rows_per_chunk=8), inputs | {"weight_VD": shard_VD}
    named, repeated = (results_and_gradients(sharded, inputs, options) for _ in range(2))
    assert all(torch.equal(named[name], repeated[name]) for name in named)
    dist.all_reduce(named["gradient of hidden"])
    shards = [torch.empty_like(shard_VD) for _ in range(group.size())]
    dist.all_gather(shards, named["gradient of weight_VD"].contiguous())
    return named | {"gradient of weight_VD": torch.cat(shards), "losses": sharded(**inputs, **options)[1]}


def reference_is_refused() -> str:
    group = join_ranks()
    with pytest.raises(ValueError) as refusal:
        cross_entropy_reference(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), vocab_size=5, group=group)
    return str(refusal.value)


@pytest.mark.parametrize("dtype, world_size", [(torch.float64, 2), (torch.float32, 2), (torch.bfloat16, 2), (torch.float32, 4)], ids=str)
def test_sharded_vocabulary_equals_the_undivided_one(dtype: torch.dtype, world_size: int, run_ranks) -> None:
    inputs, labels = make_inputs(dtype)
    options = {"labels": labels, "token_weights": token_weights(labels), "vocab_size": VOCAB_SIZE}
    expected = results_and_gradients(linear_cross_entropy_reference, inputs, options)
    expected["losses"] = linear_cross_entropy_reference(**inputs, **options)[1]
    for results in run_ranks(sharded_results, world_size, dtype):
        for name, reference in expected.items():
            assert relative_difference(results[name], reference) < BOUNDS[dtype], name


def test_the_specification_refuses_a_sharded_vocabulary(run_ranks) -> None:
    assert all('choose "cpu"' in message for message in run_ranks(reference_is_refused, 2))
