"""Triton kernels run natively where there is a GPU and in Triton's interpreter elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

_FORMATS = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


@pytest.fixture(autouse=True)
def _float8_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter rounds fp32 to float8 in a way of its own: do as the hardware does, which is what torch does."""
    if not triton.knobs.runtime.interpret:
        return

    def replaced(original: Callable) -> Callable:
        def cast(self: interpreter.InterpreterBuilder, source: interpreter.TensorHandle, dtype: tl.dtype, *mode: object) -> Any:
            if source.dtype.scalar != tl.float32 or dtype.scalar not in _FORMATS:
                return original(self, source, dtype, *mode)
            rounded = torch.from_numpy(np.array(source.data)).to(_FORMATS[dtype.scalar])
            return interpreter.TensorHandle(rounded.view(torch.uint8).numpy(), dtype.scalar)

        return cast

    for name in ("create_fp_to_fp", "cast_impl"):
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, replaced(getattr(interpreter.InterpreterBuilder, name)))
