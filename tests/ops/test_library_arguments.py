"""The wrappers of other libraries' kernels hand over and take back what is theirs: on stand-ins of the libraries, which compute in fp64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.ops.registry import select
from tests.ops import test_attention as attention, test_conv1d as conv1d, test_mamba_core as mamba_core, test_ssd as ssd
from tests.ops.comparison import assert_equivalent
from tests.ops.library_stand_ins import stand_ins


@pytest.fixture(autouse=True)
def _stand_ins() -> Iterator[None]:
    with stand_ins():
        yield


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(operation: str, implementation: str, inputs: Mapping[str, Tensor], bound: float = 1e-12, **options: Any) -> None:
    fast, specification = (functools.partial(select(operation, name), **options) for name in (implementation, "reference"))
    assert_equivalent(fast, specification, inputs, bound)


@pytest.mark.parametrize("transposed", [False, True], ids=["dense", "transposed"])
def test_rms_norm(transposed: bool) -> None:
    x = random(0, 9, 4, 24, dtype=torch.float32)
    inputs = {"x": x.transpose(0, 1) if transposed else x, "weight_D": random(1, 24, dtype=torch.float32)}
    check("rms_norm", "transformer_engine", inputs, 1e-5, eps=1e-5)


def test_rms_norm_reads_its_weight_in_the_precision_of_its_input() -> None:
    x, weight = random(0, 9, 24, dtype=torch.bfloat16), random(1, 24, dtype=torch.float32)
    check("rms_norm", "transformer_engine", {"x": x, "weight_D": weight}, 3e-2, eps=1e-5)


@pytest.mark.parametrize("transposed", [False, True], ids=["dense", "transposed"])
def test_linear(transposed: bool) -> None:
    x = random(0, 7, 3, 8)
    check("linear", "transformer_engine", {"x": x.transpose(0, 1) if transposed else x, "weight_OI": random(1, 6, 8)})


def test_linear_adds_to_the_fp32_buffer() -> None:
    linear, weight, x = select("linear", "transformer_engine"), random(1, 6, 8).bfloat16().requires_grad_(), random(0, 7, 3, 8).bfloat16()
    weight.main_grad = torch.ones(6, 8)
    for _ in range(3):
        linear(x, weight).backward(torch.ones(7, 3, 6, dtype=torch.bfloat16))
        weight.grad = None
    torch.testing.assert_close(weight.main_grad, 1 + 3 * x.sum((0, 1), dtype=torch.float32).expand(6, 8), rtol=1e-2, atol=1e-1)
    assert weight.grad_added_to_main_grad


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention(kv_heads: int) -> None:
    check("attention", "transformer_engine", attention.make_inputs(kv_heads=kv_heads))
    check("attention", "transformer_engine", attention.make_inputs(queries=5, kv_heads=kv_heads))


def test_attention_within_documents_is_refused() -> None:
    inputs = attention.make_inputs(queries=4, keys=4)
    with pytest.raises(ValueError, match="takes no mask that keeps documents apart; set data.reset_at_documents=false"):
        select("attention", "transformer_engine")(**inputs, mask_B1LS=torch.ones(2, 1, 4, 4, dtype=torch.bool).tril())


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("initial_state", [False, True], ids=["from zero", "from state"])
@pytest.mark.parametrize("length", [1, 2, 30])
def test_causal_conv1d(length: int, initial_state: bool, documents: bool) -> None:
    check(
        "causal_conv1d",
        "causal_conv1d",
        make_conv_inputs(length, initial_state),
        segment_ids_BL=conv1d.random_documents(length) if documents else None,
    )


def make_conv_inputs(length: int, initial_state: bool) -> dict[str, Tensor]:
    """Eight channels out of a wider tensor whose strides are no multiples of eight."""
    inputs = conv1d.make_inputs(length=length, initial_state=initial_state)
    return {name: tensor[:8] if name in ("weight_CW", "bias_C") else tensor[..., :8] for name, tensor in inputs.items()}


@pytest.mark.parametrize("width, first", [(24, 0), (24, 8), (24, 3), (20, 0)])
def test_channels_out_of_a_wider_tensor(width: int, first: int) -> None:
    """Whether the kernels could read them where they are or not."""
    rest = {"weight_CW": random(1, 8, 4), "bias_C": random(2, 8)}

    def out_of_wide(implementation: str) -> Callable[..., tuple[Tensor, Tensor]]:
        convolve = select("causal_conv1d", implementation)
        return lambda wide, **others: convolve(wide.transpose(0, 1)[..., first : first + 8], **others)

    assert_equivalent(out_of_wide("causal_conv1d"), out_of_wide("reference"), {"wide": random(0, 9, 2, width), **rest}, 1e-12)


@pytest.mark.parametrize("num_taps, num_channels, message", [(5, 8, "takes 2, 3 or 4 taps, got 5"), (4, 12, "multiples of 8 .* got 12")])
def test_convolutions_without_a_kernel_are_refused(num_taps: int, num_channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select("causal_conv1d", "causal_conv1d")(torch.zeros(1, 3, num_channels), torch.zeros(num_channels, num_taps), None)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_ssd(documents: bool) -> None:
    inputs = ssd.make_inputs(length=12, initial_state=documents)
    check("ssd", "mamba_ssm", inputs, 1e-10, segment_ids_BL=ssd.random_documents(2, 12) if documents else None)


@pytest.mark.parametrize("num_groups", [1, 8])
def test_gated_rms_norm(num_groups: int) -> None:
    inputs = {"y": random(0, 9, 4, 48), "gate": random(1, 9, 4, 60)[..., 6:54], "weight_D": random(2, 48)}
    check("gated_rms_norm", "mamba_ssm", inputs, num_groups=num_groups, eps=1e-5)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_mamba_core(documents: bool) -> None:
    segment_ids = mamba_core.random_documents(2, 20) if documents else None
    inputs = mamba_core.make_inputs(dtype=torch.float64)
    check("mamba_core", "mamba_ssm", inputs, 1e-10, num_groups=2, eps=1e-5, segment_ids_BL=segment_ids)


@pytest.mark.parametrize(
    "make_bad_call, message",
    [
        (lambda: select("ssd", "mamba_ssm")(**ssd.make_inputs(heads=3)), "3 heads cannot share 2 groups"),
        (lambda: select("gated_rms_norm", "mamba_ssm")(random(0, 2, 10), random(0, 2, 10), random(0, 10), 4, 1e-5), "10 channels do not"),
        (lambda: select("attention", "transformer_engine")(**attention.make_inputs(kv_heads=3)), "4 query heads cannot share 3"),
        (lambda: bad_core(), "a projection 195 wide does not hold"),
        (lambda: bad_core(head_dim=17), "multiples of 8 on a rank, got 68"),
    ],
)  # fmt: skip
def test_bad_shapes_are_refused_as_by_the_specification(make_bad_call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_bad_call()


def bad_core(**shape: int) -> Tensor:
    inputs = mamba_core.make_inputs(**shape)
    inputs["zxBCdt_LBE"] = inputs["zxBCdt_LBE"][..., :-1]
    return select("mamba_core", "mamba_ssm")(**inputs, num_groups=2, eps=1e-5)
