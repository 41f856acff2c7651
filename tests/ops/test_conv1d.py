from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.ops.conv1d import causal_conv1d, causal_conv1d_reference, causal_conv1d_step
from tests.ops.comparison import assert_equivalent, relative_difference, results_and_gradients


def make_inputs(
    *, length: int = 30, width: int = 4, dtype: torch.dtype = torch.float64, initial_state: bool = False, transposed: bool = True
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length + width)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    x_BLC = random(length, 2, 20)[..., 3:15].transpose(0, 1) if transposed else random(2, length, 12)
    inputs = {"x_BLC": x_BLC, "weight_CW": random(12, width), "bias_C": random(12)}
    return inputs | ({"initial_state_BTC": random(2, width - 1, 12)} if initial_state else {})


def random_documents(length: int) -> Tensor:
    return (torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < 0.3).cumsum(1) % 3


@pytest.mark.parametrize("length", [1, 2, 3, 30])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("initial_state", [False, True], ids=["from zero", "from state"])
@pytest.mark.parametrize("transposed", [False, True], ids=["dense", "transposed"])
def test_equals_the_specification_in_fp64(length: int, width: int, documents: bool, initial_state: bool, transposed: bool) -> None:
    inputs = make_inputs(length=length, width=width, initial_state=initial_state, transposed=transposed)
    segment_ids = random_documents(length) if documents else None
    assert_equivalent(causal_conv1d, causal_conv1d_reference, inputs, 1e-12, segment_ids_BL=segment_ids)


# The reference adds the taps in bf16, the fast version in fp32: up to W roundings of the largest term apart.
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_equals_the_specification_in_working_precision(dtype: torch.dtype, bound: float) -> None:
    assert_equivalent(causal_conv1d, causal_conv1d_reference, make_inputs(dtype=dtype), bound, segment_ids_BL=random_documents(30))


def test_specification_equals_torch_conv1d() -> None:
    inputs = make_inputs()
    padded_BCL = F.pad(inputs["x_BLC"].transpose(1, 2), (3, 0))
    expected = F.silu(F.conv1d(padded_BCL, inputs["weight_CW"][:, None], inputs["bias_C"], groups=12)).transpose(1, 2)
    torch.testing.assert_close(causal_conv1d_reference(**inputs)[0], expected)


def test_bias_may_be_absent() -> None:
    inputs = make_inputs()
    del inputs["bias_C"]
    assert_equivalent(causal_conv1d, causal_conv1d_reference, inputs, 1e-12, bias_C=None)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_gradients_match_finite_differences(documents: bool) -> None:
    inputs = make_inputs(length=5, width=3, initial_state=True)
    segment_ids = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]) if documents else None

    def convolve(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(**dict(zip(inputs, tensors, strict=True)), segment_ids_BL=segment_ids)

    assert torch.autograd.gradcheck(convolve, tuple(tensor.requires_grad_() for tensor in inputs.values()))


def test_no_tap_crosses_a_document() -> None:
    """Changing the first document changes no bit of the second one's outputs or gradients."""
    inputs = make_inputs(length=12, dtype=torch.float32)
    changed = inputs | {"x_BLC": inputs["x_BLC"].clone()}
    changed["x_BLC"][:, :6] *= -3
    options = {"segment_ids_BL": torch.tensor([[5] * 6 + [2] * 6] * 2)}
    before, after = (results_and_gradients(lambda **kw: causal_conv1d(**kw)[0], each, options) for each in (inputs, changed))
    for name in ("result 0", "gradient of x_BLC"):
        assert torch.equal(before[name][:, 6:], after[name][:, 6:]), name
        assert not torch.equal(before[name][:, :6], after[name][:, :6]), name


@pytest.mark.parametrize("split", [1, 2, 17])
def test_state_continues_a_run(split: int) -> None:
    inputs = make_inputs(length=20)
    x_BLC, rest = inputs["x_BLC"], {name: inputs[name] for name in ("weight_CW", "bias_C")}
    whole, whole_state = causal_conv1d(x_BLC, **rest)
    first, state = causal_conv1d(x_BLC[:, :split], **rest)
    second, state = causal_conv1d(x_BLC[:, split:], **rest, initial_state_BTC=state)
    assert relative_difference(torch.cat((first, second), dim=1), whole) < 1e-12
    assert torch.equal(state, whole_state)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)], ids=str)
def test_decoding_step_by_step_equals_the_whole_run(dtype: torch.dtype, bound: float) -> None:
    inputs = make_inputs(dtype=dtype)
    y, final_state = causal_conv1d(**inputs)
    state, outputs = torch.zeros_like(final_state), []
    for t in range(30):
        y_t, state = causal_conv1d_step(state, inputs["x_BLC"][:, t], inputs["weight_CW"], inputs["bias_C"])
        outputs.append(y_t)
    assert relative_difference(torch.stack(outputs, dim=1), y) < bound
    assert torch.equal(state, final_state)
