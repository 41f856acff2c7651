"""Which implementation of each operation the layers use on this host."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial

import torch

from megatron_hybrid.config import KernelsConfig
from megatron_hybrid.ops.installed import has_transformer_engine
from megatron_hybrid.ops.registry import IMPLEMENTATIONS, select
from megatron_hybrid.ops.rope import apply_rope


@dataclass(frozen=True)
class Ops:
    """The operations inside the layers; signatures stand with the specifications in ``megatron_hybrid.ops``."""

    ssd: Callable
    causal_conv1d: Callable
    rms_norm: Callable
    gated_rms_norm: Callable
    mamba_core: Callable
    squared_relu: Callable
    linear: Callable
    attention: Callable
    embedding: Callable
    linear_cross_entropy: Callable
    apply_rope: Callable = apply_rope


OPERATIONS = tuple(field.name for field in fields(Ops) if field.name != "apply_rope")
"""The operations that have more than one implementation."""


_ANYWHERE = ("reference", "cpu", "sdpa")
"""Implementations made of torch operations; all others are for GPUs."""
_LEAST_CUDNN_CAPABILITY = (9, 0)
"""From here on cuDNN's attention is the fastest, and takes every shape of ours."""


def choose_implementations(device: torch.device, dtype: torch.dtype, choices: KernelsConfig | None = None) -> dict[str, str]:
    """The implementation of every operation: what is asked for, or else the fastest that runs on ``device`` in ``dtype``.

    Raises:
        ValueError: what is asked for does not run there.
    """
    chosen = {name: "cpu" for name in OPERATIONS}
    if device.type == "cuda":
        # Versions named "cpu" are made of torch operations and run anywhere; a GPU has better ones.
        chosen |= {name: "triton" for name in OPERATIONS if "triton" in IMPLEMENTATIONS[name]} | {"linear": "cublas"}
        is_new = torch.cuda.get_device_capability(device) >= _LEAST_CUDNN_CAPABILITY
        chosen["attention"] = "cudnn" if is_new and _cudnn_obstacle(dtype) is None else "sdpa"
    asked = {} if choices is None else {name: getattr(choices, name) for name in OPERATIONS}
    asked = {name: implementation for name, implementation in asked.items() if implementation != "auto"}
    for name, implementation in asked.items():
        _require_runs(name, implementation, device, dtype)
    return chosen | asked


def _require_runs(name: str, implementation: str, device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cuda" and implementation not in _ANYWHERE:
        raise ValueError(f"kernels.{name}={implementation} needs a GPU, this run is on a CPU; set it to auto, cpu or reference")
    if implementation == "transformer_engine" and not has_transformer_engine():
        raise ValueError(
            f"kernels.{name}=transformer_engine needs transformer-engine with its torch part, which is not installed; "
            'install "transformer-engine[pytorch]", or set it to auto'
        )
    if obstacle := _obstacle(name, implementation, device, dtype):
        raise ValueError(f"kernels.{name}={implementation} cannot be had because {obstacle}; change that, or set it to auto")


def _obstacle(name: str, implementation: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an implementation does not run on a device that has it, in words that follow "because"; None where it does."""
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    match name, implementation:
        case "attention", "cudnn":
            return _cudnn_obstacle(dtype)
        case "attention", "transformer_engine" if dtype != torch.bfloat16:
            return _needs_16_bits(dtype)
        case "attention", "transformer_engine" if is_deterministic and (major := torch.cuda.get_device_capability(device)[0]) != 9:
            return f"its backward adds in a fixed order on GPUs of compute capability 9 alone and this one has {major}"
        case ("linear", "transformer_engine") | ("ssd" | "mamba_core", "mamba_ssm") if dtype == torch.float32:
            return "it multiplies fp32 numbers in TF32"
        case "linear", "cublaslt" if torch.version.hip is not None:
            return "cuBLASLt is NVIDIA's and this torch is built for AMD's GPUs"
        case "mamba_core", "mamba_ssm" if is_deterministic:
            return "its backward calls torch.cumsum, which torch refuses to run on a GPU under runtime.deterministic=true"
    return None


def _cudnn_obstacle(dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16:
        return _needs_16_bits(dtype)
    if torch.are_deterministic_algorithms_enabled():
        # cuDNN has a backward that adds in a fixed order; torch never asks for it (docs/kernels.md).
        return "its backward adds in no fixed order and runtime.deterministic=true asks for one"
    return None


def _needs_16_bits(dtype: torch.dtype) -> str:
    return f"it takes 16-bit numbers alone and this run computes in {dtype}"


def make_ops(implementations: Mapping[str, str], *, chunk_length: int | None = None) -> Ops:
    """Take every operation in the implementation named for it.

    Args:
        implementations: operation -> name of one of its implementations, for all of ``OPERATIONS``.
        chunk_length: positions per chunk of the "cpu" and the "mamba_ssm" scan; None leaves it to the implementation. The reference has no
            chunks, and the Triton one pins its own for each GPU.

    Raises:
        ValueError: a name is unknown, or the host lacks a package it needs; the message lists what there is.
    """
    ops = Ops(**{name: select(name, implementations[name]) for name in OPERATIONS})
    chunked = [name for name in ("ssd", "mamba_core") if implementations[name] in ("cpu", "mamba_ssm") and chunk_length is not None]
    return replace(ops, **{name: partial(getattr(ops, name), chunk_length=chunk_length) for name in chunked})


def ops_for(device: torch.device, dtype: torch.dtype, *, choices: KernelsConfig | None = None, chunk_length: int | None = None) -> Ops:
    """The operations for a device, by ``choose_implementations`` and ``make_ops``."""
    return make_ops(choose_implementations(device, dtype, choices), chunk_length=chunk_length)


def select_ops(implementation: str, *, chunk_length: int | None = None) -> Ops:
    """Every operation in the same implementation: "reference" for the specifications, "cpu" for the versions made of torch operations,
    which run on any device."""
    return make_ops(dict.fromkeys(OPERATIONS, implementation), chunk_length=chunk_length)


def describe_implementations(implementations: Mapping[str, str]) -> str:
    """One line for people: implementation by implementation, the operations it runs.

    >>> describe_implementations({"ssd": "triton", "attention": "cudnn", "rms_norm": "triton"})
    'cudnn: attention; triton: rms_norm, ssd'
    """
    by_name: dict[str, list[str]] = {}
    for operation, name in sorted(implementations.items()):
        by_name.setdefault(name, []).append(operation)
    return "; ".join(f"{name}: {', '.join(operations)}" for name, operations in sorted(by_name.items()))


def explain_implementations(
    device: torch.device, dtype: torch.dtype, choices: KernelsConfig | None = None, called: Collection[str] = OPERATIONS
) -> str:
    """What ``choose_implementations`` takes, in one line for people, and why where it is not the fastest for the device; in a second line
    what was asked for in vain.

    Args:
        device: where the operations run.
        dtype: what they compute in.
        choices: what is asked for.
        called: the operations that the run really calls.

    Raises:
        ValueError: what is asked for does not run there.
    """
    chosen = choose_implementations(device, dtype, choices)
    asked = sorted(name for name in OPERATIONS if choices is not None and getattr(choices, name) != "auto")
    in_vain, asked = [name for name in asked if name not in called], [name for name in asked if name in called]
    reasons = [f"{', '.join(asked)} as kernels asks for"] if asked else []
    if device.type == "cuda" and chosen["attention"] == "sdpa" and "attention" in called and "attention" not in asked:
        obstacle = _cudnn_obstacle(dtype) or "this GPU is older than those it is fastest on"
        reasons.append(f"attention not by cuDNN because {obstacle}")
    described = describe_implementations({name: chosen[name] for name in called})
    lines = [f"{described} ({'; '.join(reasons)})" if reasons else described]
    if in_vain:
        options = ", ".join(f"kernels.{name}={chosen[name]}" for name in in_vain)
        lines.append(f"warning: {options} changes nothing here: this run never calls {', '.join(in_vain)}; generating from it may")
    return "\n".join(lines)
