"""Every kernel of the Mamba-2 core compiles for Hopper at the models' sizes, fits its registers and memory, and uses the tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# bytes a block may use on Hopper
SHARED_BYTES = 227 * 1024
# warps that issue a wgmma together
WARPGROUP = 4
# a thread's spills in the launches that measured fastest; the most is the 8B's source_gradient_kernel with 308
SPILLED_BYTES = 320
WITH_PRODUCTS = {"state_walk_kernel", "chunk_output_kernel", "source_gradient_kernel", "key_gradient_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(128, 64, 8, 128), (96, 80, 8, 128), (256, 64, 8, 256)], ids=["8b", "nano-4b", "56b"])
def test_kernels_compile_for_hopper(sizes: tuple[int, ...]) -> None:
    """In a process of its own, because this one interprets kernels. Sizes are heads, head dim, groups, state."""
    command = [sys.executable, "-m", "tests.ops.compile_kernels", *map(str, sizes)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    root = Path(__file__).parents[2]
    finished = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stderr[-3000:]
    kernels = [json.loads(line) for line in finished.stdout.splitlines()]
    assert WITH_PRODUCTS <= {kernel["kernel"] for kernel in kernels}
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SHARED_BYTES, kernel
        assert kernel["spilled_bytes"] <= SPILLED_BYTES, kernel
        if kernel["kernel"] in WITH_PRODUCTS:
            assert kernel["wgmma" if kernel["warps"] >= WARPGROUP else "mma"] > 0, kernel
