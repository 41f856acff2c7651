"""Which implementation of each operation the layers use on this host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Protocol

import torch

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


class Choices(Protocol):
    """What the user asks for, one attribute per operation, named as in ``KernelsConfig``; "auto" leaves it to the host."""


def choose_implementations(device: torch.device, dtype: torch.dtype, choices: Choices | None = None) -> dict[str, str]:
    """The implementation of every operation: what is asked for, or else the fastest that runs on ``device`` in ``dtype``."""
    chosen = {name: "cpu" for name in OPERATIONS}
    if device.type == "cuda":
        # Versions named "cpu" are made of torch operations and run anywhere; a GPU has better ones.
        chosen |= {name: "triton" for name in OPERATIONS if "triton" in IMPLEMENTATIONS[name]} | {"linear": "cublas"}
        # cuDNN's attention takes 16-bit numbers alone, and its backward adds in no fixed order.
        chosen["attention"] = "cudnn" if dtype == torch.bfloat16 and not torch.are_deterministic_algorithms_enabled() else "sdpa"
    asked = {} if choices is None else {name: getattr(choices, name) for name in OPERATIONS}
    return chosen | {name: implementation for name, implementation in asked.items() if implementation != "auto"}


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


def ops_for(device: torch.device, dtype: torch.dtype, *, choices: Choices | None = None, chunk_length: int | None = None) -> Ops:
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
