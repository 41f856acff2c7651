"""Tensors here are small: one thread is faster than two, and does not suffer from other work on the machine.

Triton kernels run natively where there is a GPU and in Triton's interpreter elsewhere, on small shapes, because it is slow.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from megatron_hybrid.ops.triton import conv1d
from megatron_hybrid.ops.triton.launch import ConvLaunch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


@pytest.fixture(autouse=True)
def _bf16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter holds bf16 as 16-bit integers, multiplies those, and truncates to bf16: do as the hardware does."""
    if not triton.knobs.runtime.interpret:
        return
    builder = interpreter.InterpreterBuilder
    create_dot, cast_impl = builder.create_dot, builder.cast_impl

    def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast(self: interpreter.InterpreterBuilder, source: interpreter.TensorHandle, dtype: tl.dtype) -> interpreter.TensorHandle:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, source, dtype)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest))
    monkeypatch.setattr(builder, "cast_impl", cast)


@pytest.fixture
def short_conv_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton convolution in short runs: several programs even for the short sequences of a test."""
    launch = ConvLaunch(block_c=64, num_tiles=2, tile=4, num_warps=2)
    for function in (conv1d.conv_forward, conv1d.conv_backward):
        monkeypatch.setattr(function, "__defaults__", (launch,))
