"""What a run was made with: versions, code, host and device; and what that device can do at most."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "causal-conv1d", "einops", "mamba-ssm", "megatron-core", "numpy", "pydantic", "sentencepiece", "tokenizers", "torch",
    "transformer-engine", "transformers", "triton",
)  # fmt: skip

_PEAK_BF16_TFLOPS = (
    (r"GB200", 2500.0),
    (r"B200", 2250.0),
    (r"GH200", 989.4),
    (r"H200 NVL", 835.5),
    (r"H200", 989.4),
    (r"H100 PCIe", 756.5),
    (r"H100 NVL", 835.5),
    (r"H100", 989.4),
    (r"H20", 148.0),
    (r"A100|A800", 312.0),
    (r"A40", 149.7),
    (r"A30", 165.0),
    (r"A10", 125.0),
    (r"L40S", 362.0),
    (r"L40", 181.0),
    (r"L4", 121.0),
)
"""Dense BF16 with fp32 accumulation, from NVIDIA's data sheets; the first pattern that is a whole word of the device's name."""


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return what to keep beside a run's results, as plain JSON values."""
    return {
        # Not sys.orig_argv: in a local rank that is multiprocessing's own command, while argv is the launcher's.
        "command": [sys.executable, *sys.argv],
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "num_cpus": os.cpu_count(),
        "device": device_name(device),
        "cuda": torch.version.cuda,
        "packages": _package_versions(),
        "code": code_version(Path(__file__).parent),
    }


def code_version(folder: Path) -> dict[str, Any]:
    """Return the commit that ``folder`` stands at and whether tracked or new files differ from it; both None where no repository tracks it.

    An installed copy lies in some environment's folder, which another project's repository may enclose.
    """
    if not _git(folder, "ls-files", "--error-unmatch", "."):
        return {"commit": None, "dirty": None}
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain")
    return {"commit": commit, "dirty": None if commit is None or changes is None else bool(changes)}


def device_name(device: torch.device) -> str:
    """Return the model name of a GPU, or of the host's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name()


def peak_tflops(device: torch.device) -> float | None:
    """Return the dense BF16 peak of a GPU in TFLOP/s; None on a CPU and for a GPU that the table does not know."""
    return peak_tflops_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_tflops_by_name(name: str) -> float | None:
    """Return the dense BF16 peak in TFLOP/s of a GPU by the name that torch gives it.

    >>> peak_tflops_by_name("NVIDIA H100 80GB HBM3"), peak_tflops_by_name("NVIDIA A100-SXM4-80GB"), peak_tflops_by_name("NVIDIA T1000")
    (989.4, 312.0, None)
    """
    return next((peak for pattern, peak in _PEAK_BF16_TFLOPS if re.search(rf"\b(?:{pattern})\b", name)), None)


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        info = ""
    match = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return match.group(1) if match else platform.processor() or platform.machine()
