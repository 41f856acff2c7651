"""The fast Mamba-2 cores are the composition of the three specifications."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_hybrid.ops.mamba_core import mamba_core, mamba_core_reference
from megatron_hybrid.ops.triton.mamba_core import mamba_core as mamba_core_triton
from tests.ops.comparison import assert_equivalent, assert_near_fp64, l2_distance, results_and_gradients

FP32_BOUNDS, BF16_BOUNDS = (5e-6, 1e-5), (5e-3, 1e-2)
pytestmark = pytest.mark.usefixtures("short_conv_runs")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="too large for the interpreter: needs a GPU")


def make_inputs(
    *,
    length: int = 20,
    batch: int = 2,
    heads: int = 4,
    head_dim: int = 16,
    groups: int = 2,
    state: int = 16,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length + heads)
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    wide = torch.promote_types(dtype, torch.float32)
    return {
        "zxBCdt_LBE": random(length, batch, inner + channels + heads).to(dtype),
        "conv_weight_CW": random(channels, 4).mul(0.5).to(dtype),
        "conv_bias_C": random(channels).to(dtype),
        "A_log_H": torch.rand(heads, dtype=torch.float64, generator=generator).to(wide),
        "D_H": random(heads).to(wide),
        "dt_bias_H": random(heads).sub(2).to(wide),
        "norm_weight_I": random(inner).to(dtype),
    }


def random_documents(batch: int, length: int) -> Tensor:
    return (torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) < 1 / 8).cumsum(1) % 3


def on(device: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_the_version_in_torch_equals_the_specification_in_fp64(documents: bool) -> None:
    fast = functools.partial(mamba_core, chunk_length=8)
    options = {"num_groups": 2, "eps": 1e-5, "segment_ids_BL": random_documents(2, 20) if documents else None}
    assert_equivalent(fast, mamba_core_reference, make_inputs(dtype=torch.float64), 1e-10, **options)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_the_triton_version_equals_the_specification_in_fp32(device: str, documents: bool) -> None:
    fast = functools.partial(mamba_core_triton, chunk_length=16)
    options = {"num_groups": 2, "eps": 1e-5, "segment_ids_BL": random_documents(2, 20).to(device) if documents else None}
    assert_near_fp64(fast, mamba_core_reference, on(device, make_inputs()), FP32_BOUNDS, **options)


def test_the_triton_version_is_as_near_to_fp64_in_bf16_as_the_one_in_torch(device: str) -> None:
    """A norm over few channels magnifies roundings, in both versions alike."""
    inputs, options = on(device, make_inputs(dtype=torch.bfloat16, batch=1)), {"num_groups": 2, "eps": 1e-5}
    exact = results_and_gradients(
        mamba_core, {name: tensor.double() for name, tensor in inputs.items()}, options, cotangent_dtype=torch.bfloat16
    )
    ours, torchs = (
        results_and_gradients(core, inputs, options) for core in (functools.partial(mamba_core_triton, chunk_length=16), mamba_core)
    )
    for name, reference in exact.items():
        assert l2_distance(ours[name], reference) <= 1.5 * l2_distance(torchs[name], reference), name


@NEEDS_GPU
def test_the_triton_version_equals_the_one_in_torch_at_a_models_size(device: str) -> None:
    inputs = on(device, make_inputs(length=1037, heads=16, head_dim=64, state=128, dtype=torch.bfloat16))
    options = {"num_groups": 2, "eps": 1e-5, "segment_ids_BL": random_documents(2, 1037).to(device)}
    assert_near_fp64(mamba_core_triton, mamba_core, inputs, BF16_BOUNDS, **options)


@NEEDS_GPU
def test_offsets_beyond_two_to_the_31(device: str) -> None:
    """Of 65,536 positions the last document alone gives the same bits."""
    inputs = on(device, make_inputs(length=65536, batch=2, heads=128, head_dim=64, groups=8, state=128, dtype=torch.bfloat16))
    documents = torch.zeros(2, 65536, dtype=torch.int64, device=device)
    documents[:, -4096:] = 1
    options = {"num_groups": 8, "eps": 1e-5}
    whole = mamba_core_triton(**inputs, **options, segment_ids_BL=documents)[-4096:]
    alone = mamba_core_triton(**(inputs | {"zxBCdt_LBE": inputs["zxBCdt_LBE"][-4096:]}), **options)
    assert torch.equal(whole, alone)


def test_documents_do_not_mix(device: str) -> None:
    """Changing the first document changes no bit of the second one's outputs or gradients."""
    inputs = on(device, make_inputs(batch=1))
    changed = inputs | {"zxBCdt_LBE": inputs["zxBCdt_LBE"].clone()}
    changed["zxBCdt_LBE"][:9] *= -3
    options = {"num_groups": 2, "eps": 1e-5, "segment_ids_BL": torch.tensor([[0] * 9 + [1] * 11], device=device), "chunk_length": 16}
    before, after = (results_and_gradients(mamba_core_triton, each, options) for each in (inputs, changed))
    for name in ("result 0", "gradient of zxBCdt_LBE"):
        assert torch.equal(before[name][9:], after[name][9:]), name
        assert not torch.equal(before[name][:9], after[name][:9]), name


def test_the_triton_version_keeps_the_projection_and_the_scan_alone(device: str) -> None:
    inputs = on(device, make_inputs(length=4, batch=1))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        mamba_core_triton(**{name: tensor.requires_grad_() for name, tensor in inputs.items()}, num_groups=2, eps=1e-5)
    assert {tuple(tensor.shape) for tensor in saved if tensor.dim() == 3} == {tuple(inputs["zxBCdt_LBE"].shape), (1, 4, 64)}


@pytest.mark.parametrize("core", [mamba_core_reference, mamba_core, mamba_core_triton])
def test_sizes_that_do_not_add_up_are_refused(device: str, core: Callable) -> None:
    inputs = on(device, make_inputs())
    inputs["zxBCdt_LBE"] = inputs["zxBCdt_LBE"][..., :-1]
    with pytest.raises(ValueError, match="a projection 195 wide does not hold z \\[64\\], x, B and C \\[128\\] in 2 groups and dt \\[4\\]"):
        core(**inputs, num_groups=2, eps=1e-5)


def test_gradients_of_its_small_weights_go_to_their_buffers(device: str) -> None:
    """As a layer calls it: parameters, the convolution's with the axis that Conv1d has."""
    inputs = on(device, make_inputs())
    inputs["conv_weight_CW"] = inputs["conv_weight_CW"].unsqueeze(1)
    projection, weights = inputs.pop("zxBCdt_LBE"), {name: torch.nn.Parameter(tensor) for name, tensor in inputs.items()}
    options = {"num_groups": 2, "eps": 1e-5}
    expected = torch.autograd.grad(mamba_core_reference(projection, **weights, **options).square().sum(), list(weights.values()))
    for weight in weights.values():
        weight.main_grad = torch.ones_like(weight, requires_grad=False)
    for _ in range(2):
        mamba_core_triton(projection, **weights, **options, chunk_length=16).square().sum().backward()
        for weight in weights.values():
            # as the data-parallel wrapper's hook does
            weight.grad = None
    for (name, weight), gradient in zip(weights.items(), expected, strict=True):
        assert weight.grad_added_to_main_grad, name
        torch.testing.assert_close(weight.main_grad.detach(), 1 + 2 * gradient, rtol=1e-3, atol=1e-3)
