"""The kernels of Transformer Engine, mamba_ssm and causal_conv1d are the specifications, forward and backward: on a GPU that has them.

    MAMBA_DETERMINISTIC=1 python -m pytest tests/ops/test_library_kernels.py

The variable keeps mamba_ssm from compiling and timing some ten versions of each of its kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.ops.registry import select
from tests.installed import is_installed
from tests.ops import test_attention as attention, test_conv1d as conv1d, test_mamba_core as mamba_core, test_ssd as ssd
from tests.ops.comparison import assert_near_fp64, results_and_gradients

# l2 distances of results and gradients: one rounding to bf16 is 1.1e-3, attention and scan round what they multiply as well
ONE_ROUNDING, PRODUCTS, SCAN = (3e-3, 3e-3), (6e-3, 1e-2), (5e-3, 1e-2)
DOCUMENTS = pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
EPS = 1e-5

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="the libraries' kernels need a GPU")


def needs(*distributions: str) -> pytest.MarkDecorator:
    missing = [distribution for distribution in distributions if not is_installed(distribution)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


NEEDS_TRANSFORMER_ENGINE = needs("transformer_engine_torch")
NEEDS_MAMBA_SSM = needs("mamba_ssm", "causal_conv1d")


def random(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def check(operation: str, implementation: str, inputs: Mapping[str, Tensor], bounds: tuple[float, float], **options: Any) -> None:
    fast, specification = (functools.partial(select(operation, name), **options) for name in (implementation, "reference"))
    on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
    assert_near_fp64(fast, specification, on_gpu, bounds)


def documents_of(batch: int, length: int, documents: bool) -> Tensor | None:
    return ssd.random_documents(batch, length).cuda() if documents else None


@NEEDS_TRANSFORMER_ENGINE
@pytest.mark.parametrize("dtype, bounds", [(torch.float32, (1e-6, 1e-6)), (torch.bfloat16, ONE_ROUNDING)], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["dense", "transposed"])
@pytest.mark.parametrize("size", [24, 4096])
def test_rms_norm(dtype: torch.dtype, bounds: tuple, transposed: bool, size: int) -> None:
    x = random(0, 37, 4, size, dtype=dtype)
    inputs = {"x": x.transpose(0, 1) if transposed else x, "weight_D": random(1, size, dtype=dtype)}
    check("rms_norm", "transformer_engine", inputs, bounds, eps=EPS)


@NEEDS_TRANSFORMER_ENGINE
@pytest.mark.parametrize("shape", [(1, 1, 16, 8), (37, 2, 64, 200), (512, 1, 1024, 2048)], ids=str)
def test_linear(shape: tuple[int, int, int, int]) -> None:
    length, batch, num_inputs, num_outputs = shape
    inputs = {"x": random(0, length, batch, num_inputs), "weight_OI": random(1, num_outputs, num_inputs)}
    check("linear", "transformer_engine", inputs, ONE_ROUNDING)


@NEEDS_TRANSFORMER_ENGINE
def test_linear_adds_to_the_fp32_buffer_what_cublas_adds() -> None:
    buffers = []
    for implementation in ("transformer_engine", "cublas"):
        weight = random(1, 384, 256).requires_grad_()
        weight.main_grad = torch.ones(384, 256, device="cuda")
        for seed in range(3):
            select("linear", implementation)(random(seed, 64, 2, 256), weight).backward(random(7, 64, 2, 384))
            weight.grad = None
        assert weight.grad_added_to_main_grad
        buffers.append(weight.main_grad)
    torch.testing.assert_close(*buffers, rtol=1e-5, atol=1e-3)


@NEEDS_TRANSFORMER_ENGINE
@pytest.mark.parametrize("heads, kv_heads, head_dim, length", [(8, 8, 64, 300), (8, 2, 128, 1037), (32, 8, 128, 512)])
def test_attention(heads: int, kv_heads: int, head_dim: int, length: int) -> None:
    inputs = {name: random(seed, length, 2, num, head_dim).transpose(0, 1)
              for seed, (name, num) in enumerate({"q_BLHP": heads, "k_BSJP": kv_heads, "v_BSJP": kv_heads}.items())}  # fmt: skip
    check("attention", "transformer_engine", inputs, PRODUCTS)


@NEEDS_TRANSFORMER_ENGINE
def test_attention_of_the_last_queries_goes_to_torch() -> None:
    check("attention", "transformer_engine", attention.make_inputs(queries=5, dtype=torch.bfloat16), PRODUCTS)


@NEEDS_TRANSFORMER_ENGINE
def test_attention_repeats_bit_for_bit_when_torch_is_to_be_deterministic() -> None:
    """Long enough for many blocks to add to one gradient."""
    inputs = {name: random(seed, 1, 4096, num, 128) for seed, (name, num) in enumerate({"q_BLHP": 16, "k_BSJP": 4, "v_BSJP": 4}.items())}
    torch.use_deterministic_algorithms(True)
    try:
        runs = [results_and_gradients(select("attention", "transformer_engine"), inputs, {}) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)


@needs("causal_conv1d")
@DOCUMENTS
@pytest.mark.parametrize("initial_state", [False, True], ids=["from zero", "from state"])
@pytest.mark.parametrize("length, width", [(1, 4), (19, 4), (300, 4), (12, 2)])
@pytest.mark.parametrize("dtype, bounds", [(torch.float32, (1e-6, 1e-6)), (torch.bfloat16, ONE_ROUNDING)], ids=str)
def test_causal_conv1d(length: int, width: int, initial_state: bool, documents: bool, dtype: torch.dtype, bounds: tuple) -> None:
    inputs = conv1d.make_inputs(length=length, width=width, dtype=dtype, initial_state=initial_state)
    inputs = {name: tensor[:8] if name in ("weight_CW", "bias_C") else tensor[..., :8] for name, tensor in inputs.items()}
    check("causal_conv1d", "causal_conv1d", inputs, bounds, segment_ids_BL=documents_of(2, length, documents))


@needs("causal_conv1d")
@pytest.mark.parametrize("width, first", [(24, 0), (24, 8), (24, 3), (20, 0)])
def test_causal_conv1d_of_channels_out_of_a_wider_tensor(width: int, first: int) -> None:
    def out_of_wide(implementation: str) -> Callable[..., tuple[Tensor, Tensor]]:
        convolve = select("causal_conv1d", implementation)
        return lambda wide, **others: convolve(wide.transpose(0, 1)[..., first : first + 8], **others)

    inputs = {"wide": random(0, 300, 2, width), "weight_CW": random(1, 8, 4), "bias_C": random(2, 8)}
    assert_near_fp64(out_of_wide("causal_conv1d"), out_of_wide("reference"), inputs, ONE_ROUNDING)


@NEEDS_MAMBA_SSM
@DOCUMENTS
@pytest.mark.parametrize("groups", [1, 8])
def test_ssd(groups: int, documents: bool) -> None:
    inputs = ssd.make_inputs(length=300, heads=8, head_dim=64, groups=groups, state=128, dtype=torch.bfloat16, initial_state=True)
    segment_ids = documents_of(2, 300, documents)
    fast = functools.partial(select("ssd", "mamba_ssm"), segment_ids_BL=segment_ids, chunk_length=128)
    specification = functools.partial(select("ssd", "cpu"), segment_ids_BL=segment_ids)
    assert_near_fp64(fast, specification, {name: tensor.cuda() for name, tensor in inputs.items()}, SCAN)


@NEEDS_MAMBA_SSM
@pytest.mark.parametrize("num_groups", [1, 8])
@pytest.mark.parametrize("dtype, bounds", [(torch.float32, (1e-6, 1e-6)), (torch.bfloat16, ONE_ROUNDING)], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["dense", "transposed"])
def test_gated_rms_norm(num_groups: int, dtype: torch.dtype, bounds: tuple, transposed: bool) -> None:
    y, gate = random(0, 37, 4, 512, dtype=dtype), random(1, 37, 4, 640, dtype=dtype)[..., 64:576]
    if transposed:
        y, gate = y.transpose(0, 1), gate.transpose(0, 1)
    inputs = {"y": y, "gate": gate, "weight_D": random(2, 512, dtype=dtype)}
    check("gated_rms_norm", "mamba_ssm", inputs, bounds, num_groups=num_groups, eps=EPS)


@NEEDS_MAMBA_SSM
@DOCUMENTS
@pytest.mark.parametrize("groups, batch", [(1, 1), (8, 1), (8, 2)])
def test_mamba_core(groups: int, batch: int, documents: bool) -> None:
    inputs = mamba_core.make_inputs(length=300, batch=batch, heads=8, head_dim=64, groups=groups, state=128, dtype=torch.bfloat16)
    options = {"num_groups": groups, "eps": EPS, "segment_ids_BL": documents_of(batch, 300, documents)}
    fast = functools.partial(select("mamba_core", "mamba_ssm"), chunk_length=128, **options)
    on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
    assert_near_fp64(fast, functools.partial(select("mamba_core", "cpu"), **options), on_gpu, SCAN)
