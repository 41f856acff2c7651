"""The Triton convolution is the specification, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_hybrid.ops.conv1d import causal_conv1d_reference
from megatron_hybrid.ops.triton.conv1d import causal_conv1d
from tests.ops.comparison import assert_near_fp64, results_and_gradients
from tests.ops.test_conv1d import make_inputs, random_documents

pytestmark = pytest.mark.usefixtures("short_conv_runs")


def on(device: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@pytest.mark.parametrize("length, width", [(1, 4), (2, 4), (19, 4), (7, 1), (12, 2)])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("initial_state", [False, True], ids=["from zero", "from state"])
def test_equals_the_specification_in_fp32(device: str, length: int, width: int, documents: bool, initial_state: bool) -> None:
    inputs = on(device, make_inputs(length=length, width=width, dtype=torch.float32, initial_state=initial_state))
    segment_ids = random_documents(length).to(device) if documents else None
    assert_near_fp64(causal_conv1d, causal_conv1d_reference, inputs, (1e-6, 1e-6), segment_ids_BL=segment_ids)


def test_equals_the_specification_in_bf16(device: str) -> None:
    """One rounding of each result: sums are in fp32."""
    inputs = on(device, make_inputs(length=19, dtype=torch.bfloat16, transposed=False))
    assert_near_fp64(causal_conv1d, causal_conv1d_reference, inputs, (3e-3, 3e-3))


def test_bias_may_be_absent(device: str) -> None:
    inputs = on(device, make_inputs(length=6, dtype=torch.float32))
    del inputs["bias_C"]
    assert_near_fp64(causal_conv1d, causal_conv1d_reference, inputs, (1e-6, 1e-6), bias_C=None)


def test_no_tap_crosses_a_document(device: str) -> None:
    inputs = on(device, make_inputs(length=12, dtype=torch.float32))
    changed = inputs | {"x_BLC": inputs["x_BLC"].clone()}
    changed["x_BLC"][:, :6] *= -3
    options = {"segment_ids_BL": torch.tensor([[5] * 6 + [2] * 6] * 2, device=device)}
    before, after = (results_and_gradients(lambda **kw: causal_conv1d(**kw)[0], each, options) for each in (inputs, changed))
    for name in ("result 0", "gradient of x_BLC"):
        assert torch.equal(before[name][:, 6:], after[name][:, 6:]), name
        assert not torch.equal(before[name][:, :6], after[name][:, :6]), name
