"""The run directory records what a run was made with, and MFU knows the peak of common GPUs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_hybrid.substrate.environment import code_version, describe_environment, peak_tflops, peak_tflops_by_name


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_tflops_by_name(name) == peak


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_tflops(torch.device("cpu")) is None


def test_environment_is_plain_json_with_what_matters() -> None:
    environment = json.loads(json.dumps(describe_environment(torch.device("cpu"))))
    assert environment["packages"]["megatron-core"] == "0.16.1"
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert environment["device"] and environment["host"] and environment["python"] and environment["command"]


def test_commit_and_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *author, *arguments], check=True, capture_output=True, timeout=30)

    assert code_version(tmp_path) == {"commit": None, "dirty": None}
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    clean = code_version(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert code_version(tmp_path) == {"commit": clean["commit"], "dirty": True}
