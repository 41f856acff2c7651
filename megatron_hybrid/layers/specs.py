"""Which implementation of each op the layers use on this host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch

from megatron_hybrid.ops.registry import select
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
    linear_cross_entropy: Callable
    apply_rope: Callable = apply_rope


def ops_for(device: torch.device, *, chunk_length: int | None = None) -> Ops:
    """The fastest implementation of every operation that runs on ``device``.

    The versions named "cpu" are made of torch operations and run anywhere; attention alone has a better one elsewhere.
    """
    ops = select_ops("cpu", chunk_length=chunk_length)
    return ops if device.type == "cpu" else replace(ops, attention=select("attention", "sdpa"))


def select_ops(implementation: str, *, chunk_length: int | None = None) -> Ops:
    """Take every operation in the named implementation.

    Args:
        implementation: "reference" for the plain-torch specifications, "cpu" for the fast versions built of torch operations, which run on
            any device.
        chunk_length: positions per chunk of the scan; None leaves it to the implementation. The reference has no chunks.

    Raises:
        ValueError: the name is unknown; the message lists those there are.
    """
    names = [field.name for field in fields(Ops) if field.name != "apply_rope"]
    ops = Ops(**{name: select(name, implementation) for name in names})
    if chunk_length is None or implementation == "reference":
        return ops
    return replace(ops, ssd=partial(ops.ssd, chunk_length=chunk_length), mamba_core=partial(ops.mamba_core, chunk_length=chunk_length))
