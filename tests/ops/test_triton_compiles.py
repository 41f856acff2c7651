"""Every Triton kernel compiles for Hopper at the models' sizes and fits its registers and memory; the scan's use the tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# bytes a block may use on Hopper
SHARED_BYTES = 227 * 1024
# warps that issue a wgmma together
WARPGROUP = 4
# a thread's spills in the launches that measured fastest; the most is the 8B's source_gradient_kernel with 308. Those of fp32 and of the
# widest states have not been timed.
SPILLED_BYTES, SPILLED_BYTES_FP32, SPILLED_BYTES_WIDE = 320, 512, 768
WITH_PRODUCTS = {"state_walk_kernel", "chunk_output_kernel", "source_gradient_kernel", "key_gradient_kernel"}
COMPILING_LIMIT_S = 280
DTYPES = ("bfloat16", "float32")
# operation -> kernels that it must have launched, among others
OPERATIONS = {
    "ssd": WITH_PRODUCTS | {"decay_kernel", "decay_gradient_kernel"},
    "conv1d": {"conv1d_forward_kernel", "conv1d_backward_kernel"},
    "norms": {"norm_forward_kernel", "norm_backward_kernel"},
    "row_sum": {"_add_sums_kernel"},
    "squared_relu": {"squared_relu_forward_kernel", "squared_relu_backward_kernel"},
    "embedding": {"_add_rows_kernel"},
    "cross_entropy": {"_loss_kernel", "_statistics_kernel", "_gradient_kernel"},
    "distillation": {"_statistics_kernel", "_gradient_kernel"},
    "fp8": {"_amax_kernel", "_scales_kernel", "_cast_kernel"},
    "adamw": {"_update_kernel"},
    "decode_linear": {"_walk_kernel", "_multiply_kernel", "_rms_norm_kernel"},
    "decode_attention": {"_part_kernel", "_join_kernel"},
    "decode_mamba": {"_update_kernel", "_gated_norm_kernel"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, spilled_bytes",
    [
        ((128, 64, 8, 128), SPILLED_BYTES),
        ((96, 80, 8, 128), SPILLED_BYTES),
        ((256, 64, 8, 256), SPILLED_BYTES),
        ((16, 256, 2, 256), SPILLED_BYTES_WIDE),
        ((16, 128, 2, 512), SPILLED_BYTES_WIDE),
    ],
    ids=["8b", "nano-4b", "56b", "256x256", "128x512"],
)
def test_the_mamba_core_compiles_for_hopper(sizes: tuple[int, ...], spilled_bytes: int) -> None:
    """Sizes are heads, head dim, groups, state: those of the models, and the largest of which the kernels take no double."""
    (kernels,) = compiled(("mamba_core", "bfloat16", *sizes)).values()
    check_launched(kernels, WITH_PRODUCTS)
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SHARED_BYTES, kernel
        assert kernel["spilled_bytes"] <= spilled_bytes, kernel
        if kernel["kernel"] in WITH_PRODUCTS:
            # a wgmma takes 64 rows, which the short chunks of a wide state have not
            takes_wgmma = kernel["warps"] >= WARPGROUP and spilled_bytes != SPILLED_BYTES_WIDE
            assert kernel["wgmma"] > 0 if takes_wgmma else kernel["wgmma"] + kernel["mma"] > 0, kernel


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_compile_for_hopper(operation: str, dtype: str) -> None:
    kernels = compiled(*((each, dtype) for each in OPERATIONS))[operation]
    check_launched(kernels, OPERATIONS[operation])
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SHARED_BYTES, kernel
        assert kernel["spilled_bytes"] <= (SPILLED_BYTES if dtype == "bfloat16" else SPILLED_BYTES_FP32), kernel


def check_launched(kernels: list[dict[str, Any]], expected: set[str]) -> None:
    errors = [kernel["error"] for kernel in kernels if "error" in kernel]
    assert not errors, errors
    assert expected <= {kernel["kernel"] for kernel in kernels}, f"not all were compiled within {COMPILING_LIMIT_S} s"


@cache
def compiled(*calls: tuple[Any, ...]) -> dict[str, list[dict[str, Any]]]:
    """Operation -> its kernels. In a process of its own, because this one interprets kernels; importing torch there takes longer than most
    kernels, and so one compiles for many operations. What it does not get to in time has no kernels."""
    command = [sys.executable, "-m", "tests.ops.compile_kernels", *(",".join(map(str, call)) for call in calls)]
    environment, root = os.environ | {"TRITON_INTERPRET": "0"}, Path(__file__).parents[2]
    try:
        output = subprocess.run(command, env=environment, cwd=root, stdout=subprocess.PIPE, timeout=COMPILING_LIMIT_S, check=True).stdout
    except subprocess.TimeoutExpired as expired:
        output = expired.output or b""
    kernels = [json.loads(line) for line in output.splitlines(keepends=True) if line.endswith(b"\n")]
    return {operation: [kernel for kernel in kernels if kernel["operation"] == operation] for operation, *_ in calls}
