"""Which implementation of each operation a run takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args
from unittest import mock

import pytest
import torch

from megatron_hybrid.config.schema import KernelsConfig, RunConfig
from megatron_hybrid.fp8.backends import choose_implementation
from megatron_hybrid.layers import specs
from megatron_hybrid.layers.specs import (
    OPERATIONS,
    choose_implementations,
    describe_implementations,
    explain_implementations,
    make_ops,
)
from megatron_hybrid.model.build import called_operations
from megatron_hybrid.ops import installed
from megatron_hybrid.ops.registry import IMPLEMENTATIONS, select
from tests.fp8.runs import float8_run
from tests.ops.library_stand_ins import stand_ins
from tests.runs import small_run, write_corpus
from tests.train.training import train


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
    assert bf16["attention"] == "cudnn" and bf16["linear"] == "cublas"
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


LIBRARY_CHOICES = [
    ("mamba_core", "mamba_ssm"),
    ("ssd", "mamba_ssm"),
    ("causal_conv1d", "causal_conv1d"),
    ("gated_rms_norm", "mamba_ssm"),
    ("rms_norm", "transformer_engine"),
    ("linear", "transformer_engine"),
    ("attention", "transformer_engine"),
]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU of compute capability 9.0 on a host that has Transformer Engine, as far as a choice can tell."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(installed, "has_transformer_engine", lambda: True)
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    return torch.device("cuda", 0)


@pytest.mark.parametrize("operation, library", LIBRARY_CHOICES)
def test_other_libraries_are_taken_when_asked_for(operation: str, library: str, hopper: torch.device) -> None:
    choices = KernelsConfig(**{operation: library})
    chosen = choose_implementations(hopper, torch.bfloat16, choices)
    assert chosen[operation] == library
    with stand_ins():
        ops = make_ops(chosen, chunk_length=64)
    function = getattr(ops, operation)
    assert getattr(function, "func", function).__module__.startswith("megatron_hybrid.ops.libraries.")
    if operation in ("ssd", "mamba_core"):
        assert function.keywords == {"chunk_length": 64}
    with pytest.raises(ValueError, match=f"kernels.{operation}={library} needs a GPU, this run is on a CPU"):
        choose_implementations(torch.device("cpu"), torch.bfloat16, choices)


@pytest.mark.parametrize(
    "operation, library, reason",
    [
        ("attention", "transformer_engine", "it takes 16-bit numbers alone"),
        ("linear", "transformer_engine", "it multiplies fp32 numbers in TF32"),
        ("ssd", "mamba_ssm", "it multiplies fp32 numbers in TF32"),
        ("mamba_core", "mamba_ssm", "it multiplies fp32 numbers in TF32"),
    ],
)
def test_libraries_without_fp32_are_refused_for_it(operation: str, library: str, reason: str, hopper: torch.device) -> None:
    with pytest.raises(ValueError, match=f"kernels.{operation}={library} cannot be had because {reason}"):
        choose_implementations(hopper, torch.float32, KernelsConfig(**{operation: library}))


@pytest.mark.parametrize("operation", ["rms_norm", "linear", "attention"])
def test_transformer_engine_without_its_torch_part_is_refused(
    operation: str, hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "has_transformer_engine", lambda: False)
    with pytest.raises(ValueError, match=f"kernels.{operation}=transformer_engine needs transformer-engine with its torch part"):
        choose_implementations(hopper, torch.bfloat16, KernelsConfig(**{operation: "transformer_engine"}))


@pytest.mark.parametrize(
    "version, is_supported", [("2.11.0", True), ("2.11.0+c188b533", True), ("2.12.0", False), ("2.1.1", False), (None, True)]
)
def test_another_version_of_transformer_engine_is_refused(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch, version: str | None, is_supported: bool
) -> None:
    """A build that does not say its version is let through."""
    if version is not None:
        sys.modules["transformer_engine"].__version__ = version
    choices = KernelsConfig(rms_norm="transformer_engine")
    if is_supported:
        assert choose_implementations(hopper, torch.bfloat16, choices)["rms_norm"] == "transformer_engine"
        return
    with pytest.raises(
        ValueError, match=f"kernels.rms_norm=transformer_engine needs transformer-engine 2.11, and {version} is installed; install"
    ):
        choose_implementations(hopper, torch.bfloat16, choices)
    with pytest.raises(
        ValueError, match=f"fp8.implementation=transformer_engine needs transformer-engine 2.11, and {version} is installed"
    ):
        choose_implementation("transformer_engine", hopper)


def test_libraries_that_do_not_repeat_are_refused_for_deterministic_runs(hopper: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, bf16 = hopper, torch.bfloat16
    attention = KernelsConfig(attention="transformer_engine")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match="kernels.mamba_core=mamba_ssm cannot be had because its backward calls torch.cumsum"):
            choose_implementations(gpu, bf16, KernelsConfig(mamba_core="mamba_ssm"))
        # The scan alone runs in generation, which has no backward.
        assert choose_implementations(gpu, bf16, KernelsConfig(ssd="mamba_ssm"))["ssd"] == "mamba_ssm"
        assert choose_implementations(gpu, bf16, attention)["attention"] == "transformer_engine"
        for capability in ((8, 0), (10, 0)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
            with pytest.raises(ValueError, match=f"compute capability 9 alone and this one has {capability[0]}"):
                choose_implementations(gpu, bf16, attention)
    finally:
        torch.use_deterministic_algorithms(False)
    assert choose_implementations(gpu, bf16, attention)["attention"] == "transformer_engine"


def test_attention_without_masks_is_refused_for_documents_kept_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kernels.attention=transformer_engine takes no mask, and data.reset_at_documents=true"):
        small_run(tmp_path, kernels={"attention": "transformer_engine"})
    small_run(tmp_path, kernels={"attention": "transformer_engine"}, data={"reset_at_documents": False})


def test_what_is_asked_for_is_taken() -> None:
    choices = KernelsConfig(rms_norm="reference", attention="sdpa")
    chosen = choose_implementations(torch.device("cpu"), torch.float32, choices)
    assert chosen["rms_norm"] == "reference" and chosen["attention"] == "sdpa" and chosen["ssd"] == "cpu"
    assert make_ops(chosen).rms_norm.__name__ == "rms_norm_reference"
    assert "reference: rms_norm; sdpa: attention" in describe_implementations(chosen)


def test_a_run_says_what_it_takes_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu, bf16 = torch.device("cpu"), torch.device("cuda", 0), torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert explain_implementations(cpu, bf16) == describe_implementations(choose_implementations(cpu, bf16))
    assert explain_implementations(gpu, bf16) == describe_implementations(choose_implementations(gpu, bf16))
    asked = explain_implementations(cpu, bf16, KernelsConfig(rms_norm="reference", attention="sdpa"))
    assert asked.endswith("reference: rms_norm; sdpa: attention (attention, rms_norm as kernels asks for)")
    torch.use_deterministic_algorithms(True)
    try:
        assert "(attention not by cuDNN because its backward adds in no fixed order and runtime" in explain_implementations(gpu, bf16)
        assert "cuDNN" not in explain_implementations(gpu, bf16, KernelsConfig(attention="sdpa"))
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert explain_implementations(gpu, bf16).endswith("(attention not by cuDNN because this GPU is older than those it is fastest on)")


def test_a_choice_that_a_run_never_calls_is_said() -> None:
    choices = KernelsConfig(ssd="reference", rms_norm="reference")
    told, warning = explain_implementations(torch.device("cpu"), torch.float32, choices, {"rms_norm", "mamba_core"}).splitlines()
    assert told == "cpu: mamba_core; reference: rms_norm (rms_norm as kernels asks for)"
    assert warning == "warning: kernels.ssd=reference changes nothing here: this run never calls ssd; generating from it may"


NO_ATTENTION = {"model": {"pattern": "M-M-"}}


@pytest.mark.parametrize(
    "sections, uncalled",
    [
        ({"fp8": {"recipe": "off"}}, []),
        ({}, ["linear", "squared_relu"]),
        ({"fp8": {"bf16_layers_at_start": 2}}, []),
        ({"fp8": {"linears": ["in_proj", "linear_fc1"]}}, []),
        ({"fp8": {"linears": ["linear_fc1", "linear_fc2"]}}, ["squared_relu"]),
        ({"fp8": {"shadow_every_steps": 1}}, []),
        ({"fp8": {"recipe": "off"}, **NO_ATTENTION}, ["attention"]),
    ],
    ids=str,
)
def test_what_a_run_calls_is_what_it_says(sections: dict, uncalled: list[str], tmp_path: Path, run_ranks: Any) -> None:
    write_corpus(tmp_path / "text")
    validation = {"sources": {"text": tmp_path / "text"}, "every_steps": 1, "num_batches": 1}
    run = float8_run(tmp_path, validation=validation, train={"steps": 1}, **sections)
    assert called_operations(run) == set(OPERATIONS) - set(uncalled) - {"ssd", "causal_conv1d", "gated_rms_norm"}
    assert run_ranks(operations_called_by, 1, run) == [called_operations(run)]


def operations_called_by(run: RunConfig) -> set[str]:
    """Train, and see."""
    called: set[str] = set()

    def recording(operation: str, implementation: str) -> Callable:
        function = select(operation, implementation)
        return lambda *arguments, **options: called.add(operation) or function(*arguments, **options)

    with mock.patch.object(specs, "select", recording):
        train(run, logged=True)
    return called


def test_the_chunk_length_is_the_cpu_scans() -> None:
    ops = make_ops(choose_implementations(torch.device("cpu"), torch.float32), chunk_length=16)
    assert ops.ssd.keywords == ops.mamba_core.keywords == {"chunk_length": 16}
