"""One token for every sequence: the specification is the ops over whole sequences, and the Triton kernels are the specification.

The kernels run in Triton's interpreter where there is no GPU (tests/conftest.py), which takes about a tenth of a second per program: shapes
are small.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.ops import decode
from megatron_hybrid.ops.attention import attention_reference
from megatron_hybrid.ops.conv1d import causal_conv1d_reference
from megatron_hybrid.ops.norm import gated_rms_norm_reference
from megatron_hybrid.ops.ssd import ssd_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of the largest value: fp32 differs in the order of summation, bf16 in where it is rounded.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

MAMBA_SHAPES = {
    "two heads to a group": {},
    "one group": {"groups": 1},
    "a group per head, head dim 12, two taps": {"groups": 4, "head_dim": 12, "taps": 2},
    "state 24, six taps": {"states": 24, "taps": 6},
}
ATTENTION_SHAPES = {"two queries per key": {}, "one key head, 5 queries": {"heads": 5, "groups": 1}, "head dim 12": {"head_dim": 12}}


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def mamba_arguments(
    *,
    batch: int = 2,
    heads: int = 4,
    head_dim: int = 16,
    groups: int = 2,
    states: int = 16,
    taps: int = 4,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(heads + head_dim)
    inner = heads * head_dim
    channels = inner + 2 * groups * states
    return {
        "zxBCdt_BE": random(generator, batch, inner + channels + heads, dtype=dtype),
        "conv_ring_BWC": random(generator, batch, taps, channels, dtype=dtype),
        "ssm_state_BHPN": random(generator, batch, heads, head_dim, states),
        "position_B": torch.tensor([0, 18][:batch], device=DEVICE),
        "is_active_B": torch.ones(batch, dtype=torch.bool, device=DEVICE),
        "conv_weight_CW": random(generator, channels, taps, dtype=dtype),
        "conv_bias_C": random(generator, channels, dtype=dtype),
        "A_log_H": random(generator, heads),
        "D_H": random(generator, heads),
        "dt_bias_H": random(generator, heads) - 2,
        "norm_weight_I": random(generator, inner, dtype=dtype),
        "num_groups": groups,
        "eps": 1e-5,
    }


def attention_arguments(
    *, heads: int = 4, groups: int = 2, head_dim: int = 16, room: int = 150, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(heads + head_dim)
    positions = [0, 64, room - 1]
    return {
        "q_BHP": random(generator, len(positions), heads, head_dim, dtype=dtype),
        "k_BGP": random(generator, len(positions), groups, head_dim, dtype=dtype),
        "v_BGP": random(generator, len(positions), groups, head_dim, dtype=dtype),
        "key_BSGP": random(generator, len(positions), room, groups, head_dim, dtype=dtype),
        "value_BSGP": random(generator, len(positions), room, groups, head_dim, dtype=dtype),
        "position_B": torch.tensor(positions, device=DEVICE),
        "is_active_B": torch.ones(len(positions), dtype=torch.bool, device=DEVICE),
    }


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= BOUNDS[dtype], error


@pytest.mark.parametrize("shape", MAMBA_SHAPES.values(), ids=MAMBA_SHAPES)
def test_mamba_steps_are_the_ops_over_a_sequence(shape: dict[str, int]) -> None:
    arguments = mamba_arguments(batch=2, **shape)
    ring, state = arguments["conv_ring_BWC"].zero_(), arguments["ssm_state_BHPN"].zero_()
    generator, length = torch.Generator().manual_seed(0), 11
    (batch, width), (_, heads, head_dim, states), groups = arguments["zxBCdt_BE"].shape, state.shape, arguments["num_groups"]
    sequence_BLE = random(generator, batch, length, width)
    outputs = []
    for position in range(length):
        arguments |= {"zxBCdt_BE": sequence_BLE[:, position].contiguous(), "position_B": torch.full((batch,), position, device=DEVICE)}
        outputs.append(decode.mamba_step(**arguments))
    inner = heads * head_dim
    z, xBC, dt = sequence_BLE.split([inner, inner + 2 * groups * states, heads], dim=-1)
    convolved, last = causal_conv1d_reference(xBC, arguments["conv_weight_CW"], arguments["conv_bias_C"])
    x, B, C = convolved.split([inner, groups * states, groups * states], dim=-1)
    y, final = ssd_reference(
        x.unflatten(-1, (heads, head_dim)), dt, arguments["A_log_H"], B.unflatten(-1, (groups, states)), C.unflatten(-1, (groups, states)),
        arguments["D_H"], arguments["dt_bias_H"],
    )  # fmt: skip
    expected = gated_rms_norm_reference(y.flatten(2), z, arguments["norm_weight_I"], groups, 1e-5)
    assert_near(torch.stack(outputs, dim=1), expected, torch.float32)
    assert_near(state, final, torch.float32)
    taps = ring.shape[1]
    assert torch.equal(ring[:, [position % taps for position in range(length - taps + 1, length)]], last)


@pytest.mark.parametrize("shape", ATTENTION_SHAPES.values(), ids=ATTENTION_SHAPES)
def test_attention_step_is_attention_over_each_sequence_alone(shape: dict[str, int]) -> None:
    arguments = attention_arguments(**shape)
    out = decode.attention_step(**arguments)
    for row, position in enumerate(arguments["position_B"].tolist()):
        key, value = (arguments[name][row : row + 1, : position + 1] for name in ("key_BSGP", "value_BSGP"))
        assert torch.equal(key[:, -1], arguments["k_BGP"][row : row + 1]) and torch.equal(value[:, -1], arguments["v_BGP"][row : row + 1])
        expected = attention_reference(arguments["q_BHP"][row : row + 1, None], key, value)[:, 0]
        assert_near(out[row : row + 1], expected, torch.float32)


def test_an_inactive_sequence_is_left_alone() -> None:
    for step, make_arguments, buffers in (
        (decode.mamba_step, mamba_arguments, ("conv_ring_BWC", "ssm_state_BHPN")),
        (decode.attention_step, attention_arguments, ("key_BSGP", "value_BSGP")),
    ):
        for each in (step, kernel_of(step)):
            arguments = make_arguments()
            arguments["is_active_B"][1] = False
            before = copied(arguments)
            each(**arguments)
            for name in buffers:
                changed = (arguments[name] != before[name]).flatten(1).any(1).tolist()
                assert not changed[1] and changed[0], (each, name)


def kernel_of(step: Any) -> Any:
    from megatron_hybrid.ops.triton import decode_attention, decode_mamba

    return {"mamba_step": decode_mamba.mamba_step, "attention_step": decode_attention.attention_step}[step.__name__]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", MAMBA_SHAPES.values(), ids=MAMBA_SHAPES)
def test_the_mamba_kernel_is_the_specification(shape: dict[str, int], dtype: torch.dtype) -> None:
    ours, theirs = mamba_arguments(**shape, dtype=dtype), mamba_arguments(**shape, dtype=dtype)
    assert_near(kernel_of(decode.mamba_step)(**ours), decode.mamba_step(**theirs), dtype)
    assert_near(ours["ssm_state_BHPN"], theirs["ssm_state_BHPN"], dtype)
    assert torch.equal(ours["conv_ring_BWC"], theirs["conv_ring_BWC"])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES.values(), ids=ATTENTION_SHAPES)
def test_the_attention_kernel_is_the_specification(shape: dict[str, int], dtype: torch.dtype) -> None:
    ours, theirs = attention_arguments(**shape, dtype=dtype), attention_arguments(**shape, dtype=dtype)
    assert_near(kernel_of(decode.attention_step)(**ours), decode.attention_step(**theirs), dtype)
    for name in ("key_BSGP", "value_BSGP"):
        assert torch.equal(ours[name], theirs[name])


def test_a_position_beyond_the_buffers_writes_nowhere() -> None:
    arguments = attention_arguments()
    # Of an idle sequence's neighbour: what is written behind a row's end would be the next row.
    arguments["position_B"][1] = arguments["key_BSGP"].shape[1]
    before = arguments["key_BSGP"].clone()
    kernel_of(decode.attention_step)(**arguments)
    assert torch.equal(arguments["key_BSGP"][1], before[1])
    assert torch.equal(arguments["key_BSGP"][2, 0], before[2, 0])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize(("input_size", "output_size"), [(64, 7), (1500, 3)])
def test_the_linear_kernels_are_the_specification(batch: int, input_size: int, output_size: int, dtype: torch.dtype) -> None:
    from megatron_hybrid.ops.triton import decode_linear

    generator = torch.Generator().manual_seed(0)
    x_BI, weight_OI, norm_weight_I, residual_BO = (
        random(generator, *shape, dtype=dtype)
        for shape in ((batch, input_size), (output_size, input_size), (input_size,), (batch, output_size))
    )
    for squared_relu in (False, True):
        arguments = (x_BI, norm_weight_I, weight_OI, 1e-5)
        expected = decode.norm_linear(*arguments, squared_relu=squared_relu)
        assert_near(decode_linear.norm_linear(*arguments, squared_relu=squared_relu), expected, dtype)
    for residual in (None, residual_BO):
        expected = decode.linear(x_BI, weight_OI, residual)
        assert_near(decode_linear.linear(x_BI, weight_OI, None if residual is None else residual.clone()), expected, dtype)
