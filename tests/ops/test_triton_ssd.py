"""The Triton scan is the specification, forward and backward: natively on a GPU, in Triton's interpreter on a CPU."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from megatron_hybrid.ops.ssd import ssd_reference
from megatron_hybrid.ops.ssd_chunked import ssd_chunked
from megatron_hybrid.ops.triton.ssd import ssd
from tests.ops.comparison import assert_near_fp64, l2_distance, relative_difference, results_and_gradients
from tests.ops.test_ssd import make_inputs, random_documents

# fp32: sums in another order. bf16, in l2: one rounding is 1.1e-3; a result passes those of the states, the mixing weights and itself, a
# gradient up to twice as many.
FP32_BOUNDS, BF16_BOUNDS = (5e-6, 1e-5), (5e-3, 1e-2)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="too large for the interpreter: needs a GPU")
DOCUMENTS = pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])

SHAPES = [
    dict(length=37),
    dict(groups=1, heads=3, head_dim=20, state=24, length=20),
    dict(length=1),
    dict(batch=1, length=16, sequence_first=False),
]
LARGE_SHAPES = [
    dict(length=1037, heads=16, head_dim=64, groups=2, state=128),
    dict(length=512, heads=24, head_dim=80, groups=8, state=128, batch=1),
    dict(length=300, heads=16, head_dim=64, groups=8, state=256, batch=1),
    dict(length=300, heads=8, head_dim=64, groups=1, state=256, batch=1),
]


def on(device: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@DOCUMENTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_recurrence_in_fp32(device: str, shape: dict, documents: bool) -> None:
    inputs = on(device, make_inputs(**shape, dtype=torch.float32, initial_state=documents))
    segment_ids = random_documents(*inputs["dt_raw_BLH"].shape[:2]).to(device) if documents else None
    assert_near_fp64(functools.partial(ssd, chunk_length=16), ssd_reference, inputs, FP32_BOUNDS, segment_ids_BL=segment_ids)


@DOCUMENTS
def test_equals_the_recurrence_in_bf16(device: str, documents: bool) -> None:
    inputs = on(device, make_inputs(length=40, dtype=torch.bfloat16, initial_state=True))
    segment_ids = random_documents(2, 40).to(device) if documents else None
    assert_near_fp64(functools.partial(ssd, chunk_length=16), ssd_reference, inputs, BF16_BOUNDS, segment_ids_BL=segment_ids)


@NEEDS_GPU
@DOCUMENTS
@pytest.mark.parametrize("dtype, bounds", [(torch.float32, (2e-5, 5e-5)), (torch.bfloat16, BF16_BOUNDS)], ids=str)
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_equals_the_chunked_scan_at_the_models_sizes(device: str, shape: dict, dtype: torch.dtype, bounds: tuple, documents: bool) -> None:
    inputs = on(device, make_inputs(**shape, dtype=dtype, initial_state=True))
    segment_ids = (random_documents(*inputs["dt_raw_BLH"].shape[:2]).to(device)) if documents else None
    assert_near_fp64(ssd, ssd_chunked, inputs, bounds, segment_ids_BL=segment_ids)


@NEEDS_GPU
@pytest.mark.parametrize("head_dim, state", [(256, 128), (128, 256), (64, 512), (256, 256), (128, 512)])
def test_equals_the_chunked_scan_with_wide_states(device: str, head_dim: int, state: int) -> None:
    inputs = on(device, make_inputs(length=300, heads=4, head_dim=head_dim, groups=2, state=state, batch=1, dtype=torch.bfloat16))
    assert_near_fp64(ssd, ssd_chunked, inputs, BF16_BOUNDS)


@pytest.mark.parametrize("chunk_length", [32, 64])
def test_chunk_length_changes_nothing(device: str, chunk_length: int) -> None:
    inputs = on(device, make_inputs(batch=1, length=40, dtype=torch.float32))
    first, second = (results_and_gradients(functools.partial(ssd, chunk_length=length), inputs, {}) for length in (16, chunk_length))
    assert all(l2_distance(first[name], second[name]) < 1e-5 for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_leaks_between_documents(device: str, dtype: torch.dtype) -> None:
    """Changing one document changes no bit of another's outputs or gradients, also where the boundary falls inside a chunk."""
    inputs = on(device, make_inputs(batch=1, length=40, heads=2, groups=1, dtype=dtype))
    options = {"segment_ids_BL": torch.tensor([[0] * 22 + [1] * 18], device=device), "chunk_length": 16}
    before = results_and_gradients(lambda **kw: ssd(**kw)[0], inputs, options)
    names = ("x_BLHP", "dt_raw_BLH", "B_BLGN", "C_BLGN")
    for changed, kept in ((slice(None, 22), slice(22, None)), (slice(22, None), slice(None, 22))):
        others = inputs | {name: inputs[name].clone() for name in names}
        for name in names:
            others[name][:, changed] *= -3
        after = results_and_gradients(lambda **kw: ssd(**kw)[0], others, options)
        for name in ("result 0", *(f"gradient of {name}" for name in names)):
            assert torch.equal(before[name][:, kept], after[name][:, kept]), name
            assert not torch.equal(before[name][:, changed], after[name][:, changed]), name


def test_initial_state_continues_a_run(device: str) -> None:
    inputs = on(device, make_inputs(batch=1, length=30, dtype=torch.float32))
    sequences = ("x_BLHP", "dt_raw_BLH", "B_BLGN", "C_BLGN")
    scan = functools.partial(ssd, chunk_length=16)

    def in_two_runs(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        first, state = scan(**{n: t[:, :17] if n in sequences else t for n, t in tensors.items()})
        rest = {n: t[:, 17:] if n in sequences else t for n, t in tensors.items()}
        second, state = scan(**rest, initial_state_BHPN=state)
        return torch.cat((first, second), dim=1), state

    assert_near_fp64(in_two_runs, ssd_reference, inputs, FP32_BOUNDS)


@pytest.mark.parametrize("dt_shift", [-200.0, 1e4])
@pytest.mark.parametrize("A_log", [-20.0, 10.0])
def test_extreme_steps_and_decays_stay_finite_and_right(device: str, dt_shift: float, A_log: float) -> None:
    inputs = make_inputs(batch=1, length=20, heads=2, groups=1, dtype=torch.float32, initial_state=True)
    inputs["dt_raw_BLH"] = inputs["dt_raw_BLH"] * 5 + dt_shift
    inputs["A_log_H"] = torch.full_like(inputs["A_log_H"], A_log)
    inputs, options = on(device, inputs), {"segment_ids_BL": random_documents(1, 20).to(device)}
    named = results_and_gradients(functools.partial(ssd, chunk_length=16), inputs, options)
    assert all(torch.isfinite(tensor).all() for tensor in named.values())
    exact = ssd_reference(**{name: tensor.double() for name, tensor in inputs.items()}, **options)
    assert relative_difference(named["result 0"], exact[0]) < 1e-4
    assert relative_difference(named["result 1"], exact[1]) < 1e-4


def test_a_huge_step_does_not_blur_the_small_ones_after_it(device: str) -> None:
    inputs = make_inputs(batch=1, length=32, heads=2, groups=1, dtype=torch.float32)
    inputs["dt_raw_BLH"] = inputs["dt_raw_BLH"].clone()
    inputs["dt_raw_BLH"][:, 5] = 1e6
    exact = ssd_reference(**{name: tensor.double() for name, tensor in inputs.items()})[0].to(device)
    assert relative_difference(ssd(**on(device, inputs), chunk_length=32)[0][:, 6:], exact[:, 6:]) < 1e-4


def test_result_has_the_memory_order_of_the_input_and_repeats(device: str) -> None:
    for sequence_first in (True, False):
        inputs = on(device, make_inputs(length=17, dtype=torch.float32, sequence_first=sequence_first))
        y, _ = ssd(**inputs, chunk_length=16)
        assert (y.transpose(0, 1) if sequence_first else y).is_contiguous()
        assert torch.equal(y, ssd(**inputs, chunk_length=16)[0])


def test_bad_arguments_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="3 heads cannot share 2 groups"):
        ssd(**on(device, make_inputs(heads=3, dtype=torch.float32)))
    with pytest.raises(ValueError, match="chunk_length must be 16, 32, 64, 128 or 256 positions for the Triton kernels, got 48"):
        ssd(**on(device, make_inputs(dtype=torch.float32)), chunk_length=48)
    with pytest.raises(ValueError, match="x_BLHP is torch.float64; the Triton kernels take float32, bfloat16 or float16"):
        ssd(**on(device, make_inputs()))
