"""Offsets beyond 2^31 elements, as 64k tokens make them: a 32-bit product of a row and its stride would wrap to a negative number.

Triton's interpreter computes 32-bit integers as a GPU does. The tensors here are rows far apart in memory that is mapped and never
touched between them, so that they cost pages and no gigabytes; where only many rows reach so far, the last program runs alone. Before each
tensor as much again is mapped: an offset that wraps reads zeros there, and the test fails instead of the process.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from megatron_hybrid.fp8 import kernels as fp8
from megatron_hybrid.fp8.formats import E4M3
from megatron_hybrid.ops.triton import activation, cross_entropy, distillation
from megatron_hybrid.ops.triton.conv1d import conv_backward, conv_forward
from megatron_hybrid.ops.triton.embedding import add_rows
from megatron_hybrid.ops.triton.norm import norm_backward, norm_forward
from megatron_hybrid.train import adamw

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would need the memory; the interpreter does not")
WRAPS = 2**31
NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE, which Python names from 3.13 on."""


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter copies arguments back to the device they came from, here from themselves onto themselves: gigabytes of zeros."""
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)


@pytest.fixture
def shift_programs(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Programs along the grid's first axis are numbered from this one on."""

    def shift(first: int) -> None:
        monkeypatch.setattr(
            interpreter.InterpreterBuilder, "set_grid_idx", lambda self, x, y, z: setattr(self, "grid_idx", (x + first, y, z))
        )

    return shift


def mapped(num_elements: int, dtype: torch.dtype) -> Tensor:
    """A vector of zeros that takes no memory until it is written, with 2^31 elements mapped before it."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    num_bytes = (WRAPS + num_elements) * dtype.itemsize
    try:
        pages = mmap.mmap(-1, num_bytes, flags=flags)
    except OSError:
        pytest.skip(f"this host maps no {num_bytes >> 30} GiB that it might not have (vm.overcommit_memory=2, or ulimit -v)")
    return torch.frombuffer(pages, dtype=dtype)[WRAPS:]


def far(near: Tensor) -> Tensor:
    """The same [rows, columns] with the last row 2^31 elements behind the first."""
    rows, columns = near.shape
    stride = WRAPS // (rows - 1) + 16 - WRAPS // (rows - 1) % 16
    result = mapped(rows * stride, near.dtype).as_strided((rows, columns), (stride, 1), storage_offset=WRAPS)
    assert (rows - 1) * stride >= WRAPS
    return result.copy_(near)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("prologue", ["none", "squared_relu_backward"])
def test_float8_casts_and_amaxes_of_far_rows(prologue: fp8.Prologue) -> None:
    x_MK, other_MK, scale = random(65, 32), random(65, 32).flip(0), torch.tensor(2.0)
    # the largest stands in the last row
    x_MK[-1, 0] = other_MK[-1, 0] = 9
    expected, amax = fp8.cast(x_MK, scale, E4M3, prologue=prologue, other_MK=other_MK), fp8.amax(x_MK, prologue=prologue, other_MK=other_MK)
    x_MK, other_MK = far(x_MK), far(other_MK)
    for cast, near in zip(fp8.cast(x_MK, scale, E4M3, prologue=prologue, other_MK=other_MK), expected, strict=True):
        assert torch.equal(cast.float(), near.float())
    assert torch.equal(fp8.amax(x_MK, prologue=prologue, other_MK=other_MK), amax)


def test_float8_results_of_more_than_two_to_the_31_numbers(monkeypatch: pytest.MonkeyPatch, shift_programs: Callable[[int], None]) -> None:
    columns = 128
    rows = WRAPS // columns + 64
    row_K = random(columns)
    expected = fp8.cast(row_K.expand(64, columns), torch.ones(()), E4M3)
    into = mapped(rows * columns, E4M3.dtype).view(rows, columns), mapped(rows * columns, E4M3.dtype).view(columns, rows)
    monkeypatch.setattr(fp8, "_grid", lambda x_MK: (1, 1))
    shift_programs(WRAPS // columns // 64)
    fp8.cast(row_K.expand(rows, columns), torch.ones(()), E4M3, into=into)
    assert torch.equal(into[0][-64:].float(), expected[0].float()) and torch.equal(into[1][:, -64:].float(), expected[1].float())


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_norms_of_far_rows(gated: bool) -> None:
    y, gate, dout, weight_D = random(3, 32), random(3, 32).flip(0), random(3, 32) + 1, random(32)
    results = []
    for place in (torch.clone, far):
        out, dy, dgate = (place(torch.zeros_like(y)) for _ in range(3))
        gates = (place(gate), dgate) if gated else (None, None)
        norm_forward(place(y), gates[0], weight_D, 2, 1e-5, out)
        dweight = norm_backward(place(y), gates[0], weight_D, 2, 1e-5, place(dout), dy, gates[1])
        results.append((out, dy, dgate, dweight))
    for near, distant in zip(*results, strict=True):
        assert torch.equal(near, distant)
    assert results[1][0][-1].count_nonzero() and results[1][1][-1].count_nonzero()


def test_losses_of_far_logits() -> None:
    logits_NV, labels_N, weights_N = random(3, 40), torch.tensor([3, 0, 39]), torch.tensor([1.0, 2.0, 3.0])
    distant_NV = far(logits_NV)
    losses_N, distant_N = (cross_entropy._loss_and_gradient(each, labels_N, weights_N, 40, None) for each in (logits_NV, distant_NV))
    assert torch.equal(losses_N, distant_N) and torch.equal(logits_NV, distant_NV)


def test_divergences_of_far_logits() -> None:
    student_NV, teacher_NV, weights_N = random(3, 40), random(3, 40).flip(0), torch.tensor([1.0, 2.0, 3.0])
    distant_NV = far(student_NV)
    pairs = (student_NV, teacher_NV), (distant_NV, far(teacher_NV))
    losses_N, distant_N = (distillation._divergence_and_gradient(*pair, weights_N, 40, 2.0, None) for pair in pairs)
    assert torch.equal(losses_N, distant_N) and torch.equal(student_NV, distant_NV)


def test_gradients_of_far_rows_of_an_embedding() -> None:
    near_VD, dy_ND, rows_N = torch.zeros(3, 16), random(3, 16), torch.tensor([2, 0, 2])
    distant_VD = far(near_VD)
    add_rows(near_VD, rows_N, dy_ND)
    add_rows(distant_VD, rows_N, far(dy_ND))
    assert torch.equal(near_VD, distant_VD) and near_VD[2].count_nonzero()


@pytest.mark.usefixtures("short_conv_runs")
def test_convolutions_of_far_positions() -> None:
    x_LC, dy_LC, weight_CW, documents_BL = random(12, 32), random(12, 32).flip(0), random(32, 4), torch.zeros(1, 12, dtype=torch.int32)
    results = []
    for place in (torch.clone, far):
        y_LC, dx_LC = place(torch.zeros_like(x_LC)), place(torch.zeros_like(x_LC))
        conv_forward(place(x_LC)[None], weight_CW, None, documents_BL, None, y_LC[None])
        dweight, _, _ = conv_backward(place(x_LC)[None], weight_CW, None, documents_BL, None, place(dy_LC)[None], dx_LC[None])
        results.append((y_LC, dx_LC, dweight))
    for near, distant in zip(*results, strict=True):
        assert torch.equal(near, distant)
    assert results[1][0][-1].count_nonzero()


def test_squared_relu_of_more_than_two_to_the_31_numbers(shift_programs: Callable[[int], None]) -> None:
    size, last = WRAPS + activation.BLOCK, slice(WRAPS, None)
    x, y, dx = (mapped(size, torch.bfloat16) for _ in range(3))
    x[last] = random(activation.BLOCK).abs()
    shift_programs(WRAPS // activation.BLOCK)
    activation.squared_relu_forward_kernel[(1,)](x, y, size, BLOCK=activation.BLOCK)
    activation.squared_relu_backward_kernel[(1,)](y, x, dx, size, BLOCK=activation.BLOCK)
    assert torch.equal(y[last], x[last].float().square().bfloat16()) and dx[last].count_nonzero()


def test_updates_of_more_than_two_to_the_31_weights(monkeypatch: pytest.MonkeyPatch, shift_programs: Callable[[int], None]) -> None:
    size, last = WRAPS + adamw._BLOCK, slice(WRAPS, None)
    weight, grad, first, second = (mapped(size, torch.float32) for _ in range(4))
    grad[last] = 1
    monkeypatch.setattr(adamw.triton, "cdiv", lambda *_: 1)
    shift_programs(WRAPS // adamw._BLOCK)
    group = {"betas": (0.9, 0.95), "lr": 0.5, "weight_decay": 0.0, "eps": 0.0, "step": 1}
    adamw._update(weight, grad, {"exp_avg": first, "exp_avg_sq": second}, group, 1.0)
    torch.testing.assert_close(weight[last], torch.full((adamw._BLOCK,), -0.5))
