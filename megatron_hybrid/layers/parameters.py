"""What a parameter is, apart from its values: how tensor parallelism cuts it, and how it starts.

Every parameter of a layer is declared once. Initialisation and sharded checkpoints read this declaration and keep no table of names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Initializer = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
"""Draws a block of the given shape, float64 or float32, from the generator."""


@dataclass(frozen=True)
class Component:
    """A named run of rows that is cut over the ranks by itself, such as z, x, B, C and dt of a Mamba-2 in_proj."""

    name: str
    size: int
    """Global number of rows."""


@dataclass(frozen=True)
class Declaration:
    """How one parameter is cut and initialised."""

    global_shape: tuple[int, ...]
    axis: int | None
    """The dimension cut over tensor-parallel ranks; None for a parameter every rank holds whole."""
    components: tuple[Component, ...]
    """Runs along ``axis``, each cut by itself; one unnamed run when the cut is plain."""
    initializer: Initializer


def declare(
    parameter: torch.nn.Parameter,
    *,
    initializer: Initializer,
    tensor_ranks: int = 1,
    axis: int | None = None,
    components: tuple[Component, ...] = (),
    sequence_parallel: bool = False,
) -> None:
    """Attach a declaration to ``parameter``, whose shape is the local one, and set the marks megatron-core reads.

    Args:
        parameter: the local shard.
        initializer: draws the initial values.
        tensor_ranks: ranks that ``axis`` is cut over.
        axis: the cut dimension, or None for a parameter every rank holds whole.
        components: runs along ``axis`` that are cut one by one; their global sizes add up to the global dimension.
        sequence_parallel: the parameter is used on a part of the sequence alone, so its gradient is summed over the tensor ranks.
    """
    shape = list(parameter.shape)
    if axis is not None:
        shape[axis] *= tensor_ranks
        components = components or (Component("", shape[axis]),)
        assert sum(component.size for component in components) == shape[axis], (components, shape)
    parameter.declaration = Declaration(tuple(shape), axis, components, initializer)
    # megatron-core reads these when it counts a gradient once over the ranks; its own setter refuses a parameter its layers have marked
    # already.
    parameter.tensor_model_parallel = axis is not None
    parameter.partition_dim = -1 if axis is None else axis
    parameter.partition_stride = 1
    parameter.sequence_parallel = sequence_parallel
    parameter.allreduce = True


def normal(std: float) -> Initializer:
    """Gaussian of the given standard deviation."""

    def draw(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32) * np.float32(std)

    return draw


def uniform(low: float, high: float) -> Initializer:
    """Uniform on [low, high)."""
    return lambda generator, shape: generator.uniform(low, high, shape)


def ones(_: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """All ones: norms, and the skip weight D."""
    return np.ones(shape)


def log_uniform_decay(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A_log with A uniform on [1, 16] (Mamba-2's initial decay rates)."""
    return np.log(generator.uniform(1.0, 16.0, shape))


def inverse_softplus_time_step(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """dt_bias with softplus(dt_bias) log-uniform on [0.001, 0.1], no smaller than 1e-4 (Mamba-2's initial time steps)."""
    time_step = np.exp(generator.uniform(math.log(1e-3), math.log(1e-1), shape)).clip(min=1e-4)
    return time_step + np.log(-np.expm1(-time_step))
