"""Which implementation of each operation the layers use on this host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial

import torch

from megatron_hybrid.config import KernelsConfig
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
        chosen |= {name: "triton" for name in OPERATIONS if "triton" in IMPLEMENTATIONS[name]} | {
            "linear": "cublaslt" if torch.version.hip is None else "cublas"
        }
        is_new = torch.cuda.get_device_capability(device) >= _LEAST_CUDNN_CAPABILITY
        chosen["attention"] = "cudnn" if is_new and _cudnn_obstacle(dtype) is None else "sdpa"
    asked = {} if choices is None else {name: getattr(choices, name) for name in OPERATIONS}
    asked = {name: implementation for name, implementation in asked.items() if implementation != "auto"}
    for name, implementation in asked.items():
        _require_runs(name, implementation, device, dtype)
    return chosen | asked


def _require_runs(name: str, implementation: str, device: torch.device, dtype: torch.dtype) -> None:
    if implementation in ("triton", "cublas", "cublaslt", "cudnn") and device.type != "cuda":
        raise ValueError(f"kernels.{name}={implementation} needs a GPU, this run is on a CPU; set it to auto, cpu or reference")
    if implementation == "cudnn" and (obstacle := _cudnn_obstacle(dtype)):
        raise ValueError(f"kernels.{name}=cudnn cannot be had because {obstacle}; change that, or set it to auto or sdpa")


def _cudnn_obstacle(dtype: torch.dtype) -> str | None:
    """Why cuDNN's attention does not run, in words that follow "because"; None where it does."""
    if dtype != torch.bfloat16:
        return f"it takes 16-bit numbers alone and this run computes in {dtype}"
    if torch.are_deterministic_algorithms_enabled():
        return "its backward adds in no fixed order and runtime.deterministic=true asks for one"
    return None


def make_ops(implementations: Mapping[str, str], *, chunk_length: int | None = None) -> Ops:
    """Take every operation in the implementation named for it.

    Args:
        implementations: operation -> name of one of its implementations, for all of ``OPERATIONS``.
        chunk_length: positions per chunk of the "cpu" scan; None leaves it to the implementation. The reference has no chunks, and the
            Triton one pins its own for each GPU.

    Raises:
        ValueError: a name is unknown, or the host lacks a package it needs; the message lists what there is.
    """
    ops = Ops(**{name: select(name, implementations[name]) for name in OPERATIONS})
    chunked = {} if chunk_length is None else {name: getattr(ops, name) for name in ("ssd", "mamba_core") if implementations[name] == "cpu"}
    return replace(ops, **{name: partial(scan, chunk_length=chunk_length) for name, scan in chunked.items()})


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
