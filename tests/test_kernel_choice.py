"""Which implementation of each operation a run takes."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from megatron_hybrid.config.schema import KernelsConfig
from megatron_hybrid.layers.specs import OPERATIONS, choose_implementations, describe_implementations, make_ops
from megatron_hybrid.ops.registry import IMPLEMENTATIONS


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_implementation_can_be_asked_for(operation: str) -> None:
    options = get_args(KernelsConfig.model_fields[operation].annotation)
    assert set(options) == {"auto", *IMPLEMENTATIONS[operation]}


def test_a_cpu_takes_what_runs_anywhere() -> None:
    assert set(choose_implementations(torch.device("cpu"), torch.float32).values()) == {"cpu"}


def test_a_gpu_takes_kernels_and_attention_by_precision_and_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    bf16 = choose_implementations(device, torch.bfloat16)
    assert bf16["attention"] == "cudnn" and bf16["linear"] == "cublaslt"
    assert {bf16[name] for name in OPERATIONS if name not in ("attention", "linear")} == {"triton"}
    assert choose_implementations(device, torch.float32)["attention"] == "sdpa"
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_implementations(device, torch.bfloat16)["attention"] == "sdpa"
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match="kernels.embedding=triton needs a GPU"):
        choose_implementations(cpu, torch.bfloat16, KernelsConfig(embedding="triton"))
    with pytest.raises(ValueError, match="kernels.attention=cudnn cannot be had because it takes 16-bit numbers"):
        choose_implementations(gpu, torch.float32, KernelsConfig(attention="cudnn"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_implementations(gpu, torch.bfloat16)["attention"] == "sdpa"


def test_what_is_asked_for_is_taken() -> None:
    choices = KernelsConfig(rms_norm="reference", attention="sdpa")
    chosen = choose_implementations(torch.device("cpu"), torch.float32, choices)
    assert chosen["rms_norm"] == "reference" and chosen["attention"] == "sdpa" and chosen["ssd"] == "cpu"
    assert make_ops(chosen).rms_norm.__name__ == "rms_norm_reference"
    assert "reference: rms_norm; sdpa: attention" in describe_implementations(chosen)


def test_the_chunk_length_is_the_cpu_scans() -> None:
    ops = make_ops(choose_implementations(torch.device("cpu"), torch.float32), chunk_length=16)
    assert ops.ssd.keywords == ops.mamba_core.keywords == {"chunk_length": 16}
