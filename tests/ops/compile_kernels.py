"""Compile the kernels of operations for a Hopper GPU, at the arguments their calls give them; no GPU is needed.

    TRITON_INTERPRET=0 python -m tests.ops.compile_kernels cross_entropy,bfloat16 fp8,float32
    TRITON_INTERPRET=0 python -m tests.ops.compile_kernels mamba_core,bfloat16,128,64,8,128     heads, head dim, groups, state

Prints a JSON object per kernel: its warps, registers and bytes of spills a thread, bytes of shared memory, and how many instructions of
the tensor cores (wgmma takes a warpgroup, which is four warps; mma any warp). An operation that does not compile is an object with the
``error``, and the others go on. The interpreter runs what a compiler may refuse, and knows no registers. `kernel_calls.py` says what is
called.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tests.ops.kernel_calls import CALLS

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.bool: "*i1",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}
LAUNCH_OPTIONS = ("num_warps", "num_stages")


class Launch(NamedTuple):
    """A kernel, and what a launch makes it compile: types, what is constant, what is divisible by 16, warps and stages."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int], Any]
    attributes: dict[tuple[int], list]
    options: dict[str, int]


def recorded_launches(call: Callable[[], None]) -> list[Launch]:
    """The different launches of what is called with CPU tensors; none is run, so that results hold anything."""
    launches: dict[str, Launch] = {}

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in LAUNCH_OPTIONS if name in kwargs}
        launch = specialised(kernel, dict(zip(kernel.arg_names, args)) | kwargs, options)
        launches.setdefault(repr(launch), launch)

    with mock.patch.object(JITFunction, "run", record), mock.patch.object(torch.Tensor, "is_cuda", True):
        call()
    return list(launches.values())


def specialised(kernel: JITFunction, arguments: dict[str, Any], options: dict[str, int]) -> Launch:
    """As Triton specialises a kernel to its arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and specialise):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(index,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and specialise:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return Launch(kernel, signature, constants, attributes, options)


def compile_for_hopper(launch: Launch) -> dict[str, Any]:
    """Compile, and ask the assembler what the kernel takes."""
    source = ASTSource(fn=launch.kernel, signature=launch.signature, constexprs=launch.constants, attrs=launch.attributes)
    compiled = triton.compile(source, target=HOPPER, options=launch.options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        command = [ptxas, "--verbose", "--gpu-name=sm_90a", file.name, "--output-file", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "kernel": launch.kernel.fn.__name__,
        "warps": compiled.metadata.num_warps,
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled_bytes": int(re.search(r"(\d+) bytes spill stores", report)[1]),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "mma": compiled.asm["ptx"].count("mma.sync"),
    }


def main() -> None:
    """Print the kernels of every OPERATION,DTYPE[,SIZES] of the command line."""
    for argument in sys.argv[1:]:
        operation, dtype, *sizes = argument.split(",")
        about = {"operation": operation, "dtype": dtype}
        try:
            for launch in recorded_launches(partial(CALLS[operation], getattr(torch, dtype), *map(int, sizes))):
                print(json.dumps(about | compile_for_hopper(launch)), flush=True)
        except Exception as error:  # whatever the operation, Triton or the assembler says
            print(json.dumps(about | {"error": f"{type(error).__name__}: {error}"}), flush=True)


if __name__ == "__main__":
    main()
