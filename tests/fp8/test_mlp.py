"""Both products of an MLP in float8, beside the float8 linears that it is made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.config import DelayedScalingConfig, Fp8Config
from megatron_hybrid.fp8.backends import Cast, cast_plain, make_backend
from megatron_hybrid.fp8.linear import GRAD_OUTPUT, INPUT, Float8Linear
from megatron_hybrid.fp8.mlp import float8_mlp
from megatron_hybrid.ops.activation import squared_relu_reference
from megatron_hybrid.ops.linear import linear


def make_pair(recipe: str) -> tuple[Float8Linear, Float8Linear]:
    delayed = DelayedScalingConfig(history_length=3) if recipe == "delayed" else DelayedScalingConfig()
    config = Fp8Config(recipe=recipe, delayed=delayed)
    fc1, fc2 = (Float8Linear(name, config, make_backend("emulated"), linear) for name in ("fc1", "fc2"))
    if recipe == "delayed":
        fc1.set_scales(torch.tensor([30.0, 500.0, 2000.0]))
        fc2.set_scales(torch.tensor([20.0, 500.0, 1000.0]))
    return fc1, fc2


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_it_is_its_two_linears(recipe: str, recompute: bool) -> None:
    """In fp32 nothing is rounded between the linears, so both ways compute the same."""
    torch.manual_seed(0)
    x, w1, w2 = torch.randn(2, 8, 16), torch.randn(32, 16) / 4, torch.randn(16, 32) / 6
    dout = torch.randn(2, 8, 16)
    results = []
    for fused in (False, True):
        fc1, fc2 = make_pair(recipe)
        leaves = [tensor.clone().requires_grad_() for tensor in (x, w1, w2)]
        if fused:
            out = float8_mlp(*leaves, fc1, fc2, recompute=recompute)
        else:
            out = fc2(squared_relu_reference(fc1(leaves[0], leaves[1])), leaves[2])
        histories = [linear.amax_history_RH for linear in (fc1, fc2) if recipe == "delayed"]
        results.append([out, *torch.autograd.grad(out, leaves, dout), *histories])
    for composed, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, composed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_transposes_are_made_for_a_backward_pass_alone(recompute: bool) -> None:
    made: list[tuple[bool, bool]] = []
    for each in (pair := make_pair("delayed")):
        each.backend = replace(each.backend, cast=recording_cast(made))
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((16, 16), (32, 16), (16, 32))]
    with torch.no_grad():
        float8_mlp(*leaves, *pair, recompute=recompute)
        pair[0](leaves[0], leaves[1])
    float8_mlp(*(leaf.detach() for leaf in leaves), *pair, recompute=recompute)
    assert made == [(True, False)] * 10
    made.clear()
    float8_mlp(*leaves, *pair, recompute=recompute)
    pair[0](leaves[0], leaves[1])
    # x, w1, y, w2; x, w1
    assert [columns for _, columns in made] == [True, True, not recompute, True, True, True]


def recording_cast(made: list[tuple[bool, bool]]) -> Cast:
    """The plain cast, which notes whether rows and columns were wanted."""

    def cast(*arguments: Any, rows: bool, columns: bool, **options: Any) -> tuple[Tensor | None, Tensor | None]:
        made.append((rows, columns))
        return cast_plain(*arguments, rows=rows, columns=columns, **options)

    return cast


def test_amaxes_are_of_what_is_cast() -> None:
    fc1, fc2 = make_pair("delayed")
    x, w1, w2 = torch.randn(16, 16), torch.randn(32, 16), torch.randn(16, 32)
    inner = fc1(x, w1)
    float8_mlp(x.requires_grad_(), w1, w2.requires_grad_(), fc1, fc2, recompute=False).sum().backward()
    assert fc2.amax_history_RH[INPUT, 0] == squared_relu_reference(inner).max()
    assert fc2.amax_history_RH[GRAD_OUTPUT, 0] == 1
    assert fc1.amax_history_RH[GRAD_OUTPUT, 0] > 0


def test_a_held_weight_is_used_until_it_is_released() -> None:
    fc1, _ = make_pair("delayed")
    x, old, new = torch.randn(16, 16), torch.randn(32, 16), torch.randn(32, 16)
    expected_old, expected_new = fc1(x, old), fc1(x, new)
    fc1.hold_weight(old)
    assert torch.equal(fc1(x, new), expected_new), "another weight is cast anew"
    held = fc1.cast_weight(old, columns=True).rows_MK
    old.copy_(new)
    assert torch.equal(fc1(x, old), expected_old), "the cast is the one that was made"
    fc1.hold_weight(old)
    assert fc1.cast_weight(old, columns=True).rows_MK.data_ptr() == held.data_ptr(), "the memory stays, for CUDA graphs"
    assert torch.equal(fc1(x, old), expected_new)
    fc1.release_weight()
    assert fc1.cast_weight(old, columns=True).rows_MK.data_ptr() != held.data_ptr()
