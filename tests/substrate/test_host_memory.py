"""Freed memory stays in the process."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

PROBE = """
import resource, torch
from megatron_hybrid.substrate.host_memory import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
for _ in range(3):
    torch.ones(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keep: bool) -> int:
    run = subprocess.run([sys.executable, "-c", PROBE.format(keep=keep)], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_large_tensors_fault_no_pages_twice() -> None:
    num_pages = 5 * (64 << 20) // resource.getpagesize()
    assert page_faults(keep=True) < num_pages / 4 < page_faults(keep=False)
