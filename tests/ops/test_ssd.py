from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from megatron_hybrid.ops.ssd import ssd_reference, ssd_step
from megatron_hybrid.ops.ssd_chunked import ssd_chunked
from tests.ops.comparison import assert_equivalent, relative_difference, results_and_gradients

# bf16 keeps 8 bits: one rounding is 2**-9. The chunked form rounds the inputs of each product once more, so a few of those.
BOUNDS = {torch.float64: 1e-10, torch.float32: 5e-5, torch.bfloat16: 3e-2}


def make_inputs(
    *,
    batch: int = 2,
    length: int = 50,
    heads: int = 4,
    head_dim: int = 16,
    groups: int = 2,
    state: int = 16,
    dtype: torch.dtype = torch.float64,
    sequence_first: bool = True,
    initial_state: bool = False,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch * length + heads)
    wide = torch.promote_types(dtype, torch.float32)

    def random(*shape: int) -> Tensor:
        values = torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)
        return values.transpose(0, 1).contiguous().transpose(0, 1) if sequence_first else values

    inputs = {
        "x_BLHP": random(batch, length, heads, head_dim),
        "dt_raw_BLH": random(batch, length, heads),
        "A_log_H": torch.rand(heads, dtype=torch.float64, generator=generator).to(wide),
        "B_BLGN": random(batch, length, groups, state),
        "C_BLGN": random(batch, length, groups, state),
        "D_H": torch.randn(heads, dtype=torch.float64, generator=generator).to(wide),
        "dt_bias_H": torch.randn(heads, dtype=torch.float64, generator=generator).sub(2).to(wide),
    }
    if initial_state:
        inputs["initial_state_BHPN"] = torch.randn(batch, heads, head_dim, state, dtype=torch.float64, generator=generator).to(wide)
    return inputs


def random_documents(batch: int, length: int) -> Tensor:
    """Ids that change about every eighth position and come back to earlier values."""
    generator = torch.Generator().manual_seed(length)
    return (torch.rand(batch, length, generator=generator) < 1 / 8).cumsum(1) % 3


SHAPES = [
    dict(),
    dict(groups=1, head_dim=64, state=16),
    dict(heads=8, groups=8, head_dim=80, state=16, length=37),
    dict(heads=2, groups=1, state=128, length=33),
    dict(heads=2, groups=2, head_dim=64, state=64, length=64),
    dict(length=1),
    dict(length=15),
    dict(batch=1, length=16),
    dict(sequence_first=False),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("initial_state", [False, True], ids=["from zero", "from state"])
def test_chunked_equals_the_recurrence_in_fp64(shape: dict, documents: bool, initial_state: bool) -> None:
    inputs = make_inputs(**shape, initial_state=initial_state)
    segment_ids = random_documents(*inputs["dt_raw_BLH"].shape[:2]) if documents else None
    fast = functools.partial(ssd_chunked, chunk_length=16)
    assert_equivalent(fast, ssd_reference, inputs, BOUNDS[torch.float64], segment_ids_BL=segment_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_chunked_equals_the_recurrence_in_working_precision(dtype: torch.dtype, documents: bool) -> None:
    inputs = make_inputs(length=130, heads=2, head_dim=64, state=64, dtype=dtype, initial_state=True)
    segment_ids = random_documents(2, 130) if documents else None
    assert_equivalent(ssd_chunked, ssd_reference, inputs, BOUNDS[dtype], segment_ids_BL=segment_ids)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_gradients_match_finite_differences(documents: bool) -> None:
    inputs = make_inputs(batch=1, length=7, heads=2, head_dim=2, groups=1, state=3, initial_state=True)
    segment_ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1]]) if documents else None

    def scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_chunked(**dict(zip(inputs, tensors, strict=True)), segment_ids_BL=segment_ids, chunk_length=3)

    assert torch.autograd.gradcheck(scan, tuple(tensor.requires_grad_() for tensor in inputs.values()))


@pytest.mark.parametrize("chunk_length", [1, 2, 7, 32, 100, 128])
def test_chunk_length_changes_nothing(chunk_length: int) -> None:
    inputs = make_inputs(length=100, initial_state=True)
    fast, peer = (functools.partial(ssd_chunked, chunk_length=length) for length in (chunk_length, 16))
    assert_equivalent(fast, peer, inputs, 1e-10)


@pytest.mark.parametrize("scan", [ssd_reference, ssd_chunked])
def test_documents_equal_separate_runs(scan) -> None:
    """Forward and backward: packing three documents is running each alone, also where a boundary falls inside a chunk or on its edge."""
    cuts = [0, 13, 64, 100]
    inputs = make_inputs(batch=1, length=100)
    sequences = ("x_BLHP", "dt_raw_BLH", "B_BLGN", "C_BLGN")
    segment_ids = torch.cat([torch.full((1, end - start), start) for start, end in zip(cuts[:-1], cuts[1:], strict=True)], dim=1)
    packed = results_and_gradients(lambda **kw: scan(**kw)[0], inputs, {"segment_ids_BL": segment_ids})

    def separately(**tensors: Tensor) -> Tensor:
        parts = []
        for start, end in zip(cuts[:-1], cuts[1:], strict=True):
            parts.append(scan(**{n: t[:, start:end] if n in sequences else t for n, t in tensors.items()})[0])
        return torch.cat(parts, dim=1)

    separate = results_and_gradients(separately, inputs, {})
    for name, expected in separate.items():
        assert relative_difference(packed[name], expected) < 1e-10, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_leaks_between_documents(dtype: torch.dtype) -> None:
    """Changing one document changes no bit of another's outputs or gradients."""
    inputs = make_inputs(batch=1, length=96, dtype=dtype)
    segment_ids = torch.tensor([[0] * 40 + [1] * 56])
    changed = dict(inputs)
    for name in ("x_BLHP", "dt_raw_BLH", "B_BLGN", "C_BLGN"):
        changed[name] = inputs[name].clone()
        changed[name][:, :40] *= -3
    options = {"segment_ids_BL": segment_ids, "chunk_length": 32}
    before, after = (results_and_gradients(lambda **kw: ssd_chunked(**kw)[0], each, options) for each in (inputs, changed))
    for name in ("result 0", "gradient of x_BLHP", "gradient of dt_raw_BLH", "gradient of B_BLGN", "gradient of C_BLGN"):
        assert torch.equal(before[name][:, 40:], after[name][:, 40:]), name
        assert not torch.equal(before[name][:, :40], after[name][:, :40]), name
    # and the other way round: the first document's gradients do not see the second
    for name in ("x_BLHP", "dt_raw_BLH", "B_BLGN", "C_BLGN"):
        changed[name] = inputs[name].clone()
        changed[name][:, 40:] *= -3
    after = results_and_gradients(lambda **kw: ssd_chunked(**kw)[0], changed, options)
    for name in ("result 0", "gradient of x_BLHP", "gradient of dt_raw_BLH", "gradient of B_BLGN", "gradient of C_BLGN"):
        assert torch.equal(before[name][:, :40], after[name][:, :40]), name


@pytest.mark.parametrize("split", [1, 16, 37])
def test_initial_state_continues_a_run(split: int) -> None:
    inputs = make_inputs(length=60)

    def in_two_runs(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        sequences = ("x_BLHP", "dt_raw_BLH", "B_BLGN", "C_BLGN")
        first, state = ssd_chunked(**{n: t[:, :split] if n in sequences else t for n, t in tensors.items()}, chunk_length=16)
        rest = {n: t[:, split:] if n in sequences else t for n, t in tensors.items()}
        second, state = ssd_chunked(**rest, initial_state_BHPN=state, chunk_length=16)
        return torch.cat((first, second), dim=1), state

    assert_equivalent(in_two_runs, functools.partial(ssd_chunked, chunk_length=16), inputs, 1e-10)


@pytest.mark.parametrize("dt_shift", [-200.0, -20.0, 20.0, 1e4])
@pytest.mark.parametrize("A_log", [-20.0, 0.0, 10.0])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_extreme_steps_and_decays_stay_finite_and_right(dt_shift: float, A_log: float, documents: bool) -> None:
    inputs = make_inputs(length=70, dtype=torch.float32, initial_state=True)
    inputs["dt_raw_BLH"] = inputs["dt_raw_BLH"] * 5 + dt_shift
    inputs["A_log_H"] = torch.full_like(inputs["A_log_H"], A_log)
    options = {"segment_ids_BL": random_documents(2, 70) if documents else None}
    named = results_and_gradients(functools.partial(ssd_chunked, chunk_length=32), inputs, options)
    assert all(torch.isfinite(tensor).all() for tensor in named.values())
    exact = ssd_reference(**{name: tensor.double() for name, tensor in inputs.items()}, **options)
    assert relative_difference(named["result 0"], exact[0]) < 1e-4
    assert relative_difference(named["result 1"], exact[1]) < 1e-4


def test_a_huge_step_does_not_blur_the_small_ones_after_it() -> None:
    """Differences of cumulative sums lose what follows a huge term unless that term is bounded first."""
    inputs = make_inputs(length=64, dtype=torch.float32)
    inputs["dt_raw_BLH"] = inputs["dt_raw_BLH"].clone()
    inputs["dt_raw_BLH"][:, 5] = 1e6
    exact = ssd_reference(**{name: tensor.double() for name, tensor in inputs.items()})[0]
    assert relative_difference(ssd_chunked(**inputs)[0][:, 6:], exact[:, 6:]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_decoding_step_by_step_ends_in_the_same_state(dtype: torch.dtype) -> None:
    inputs = make_inputs(length=200, head_dim=8, dtype=dtype)
    y, final_state = ssd_chunked(**inputs)
    state, outputs = torch.zeros_like(final_state), []
    for t in range(200):
        y_t, state = ssd_step(
            state,
            *(inputs[name][:, t] for name in ("x_BLHP", "dt_raw_BLH")),
            inputs["A_log_H"],
            *(inputs[name][:, t] for name in ("B_BLGN", "C_BLGN")),
            inputs["D_H"],
            inputs["dt_bias_H"],
        )
        outputs.append(y_t)
    assert relative_difference(torch.stack(outputs, dim=1), y) < BOUNDS[dtype]
    assert relative_difference(state, final_state) < BOUNDS[dtype]


def test_result_has_the_memory_order_of_the_input() -> None:
    for sequence_first in (True, False):
        y, _ = ssd_chunked(**make_inputs(length=48, sequence_first=sequence_first), chunk_length=16)
        assert (y.transpose(0, 1) if sequence_first else y).is_contiguous()


def test_runs_repeat_bit_for_bit() -> None:
    inputs = make_inputs(length=100, dtype=torch.float32)
    first, second = (results_and_gradients(ssd_chunked, inputs, {}) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bad_arguments_are_refused() -> None:
    inputs = make_inputs(heads=3, groups=2)
    for scan in (ssd_reference, ssd_chunked):
        with pytest.raises(ValueError, match="3 heads cannot share 2 groups"):
            scan(**inputs)
    with pytest.raises(ValueError, match="chunk_length must be a positive number"):
        ssd_chunked(**make_inputs(), chunk_length=0)
