"""Compile every kernel of the Mamba-2 core for a Hopper GPU, at the arguments one forward and backward give them; no GPU is needed.

    TRITON_INTERPRET=0 python -m tests.ops.compile_kernels HEADS HEAD_DIM GROUPS STATE

Prints a JSON object per kernel: its warps, registers and bytes of spills a thread, bytes of shared memory, and how many instructions of
the tensor cores (wgmma takes a warpgroup, which is four warps; mma any warp). The interpreter runs what a compiler may refuse, and knows
no registers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from megatron_hybrid.ops.triton import mamba_core as module

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
LAUNCH_OPTIONS = ("num_warps", "num_stages")


def recorded_launches(heads: int, head_dim: int, groups: int, state: int) -> list[tuple[JITFunction, dict[str, Any], dict[str, int]]]:
    """Kernel, arguments by name and launch options of each launch of a forward and backward with documents, on CPU tensors."""
    inner, channels, launches = heads * head_dim, heads * head_dim + 2 * groups * state, []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in LAUNCH_OPTIONS if name in kwargs}
        launches.append((kernel, dict(zip(kernel.arg_names, args)) | kwargs, options))

    tensors = [torch.zeros(256, 1, inner + channels + heads), torch.zeros(channels, 4), torch.zeros(channels)]
    tensors = [tensor.bfloat16().requires_grad_() for tensor in (*tensors, torch.zeros(inner))]
    per_head = [torch.zeros(heads, requires_grad=True) for _ in range(3)]
    with mock.patch.object(JITFunction, "run", record), mock.patch.object(module, "check_tensors", lambda **_: None):
        segment_ids = torch.zeros(1, 256, dtype=torch.int64)
        out = module.mamba_core(*tensors[:3], *per_head, tensors[3], num_groups=groups, eps=1e-5, segment_ids_BL=segment_ids)
        out.sum().backward()
    return launches


def compile_for_hopper(kernel: JITFunction, arguments: dict[str, Any], options: dict[str, int]) -> dict[str, Any]:
    """Compile as a launch with these arguments would, and ask the assembler what the kernel takes."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and specialise):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(index,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and specialise:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=HOPPER, options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        command = [ptxas, "--verbose", "--gpu-name=sm_90a", file.name, "--output-file", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "kernel": kernel.fn.__name__,
        "warps": compiled.metadata.num_warps,
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled_bytes": int(re.search(r"(\d+) bytes spill stores", report)[1]),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "mma": compiled.asm["ptx"].count("mma.sync"),
    }


if __name__ == "__main__":
    for launch in recorded_launches(*map(int, sys.argv[1:])):
        print(json.dumps(compile_for_hopper(*launch)), flush=True)
