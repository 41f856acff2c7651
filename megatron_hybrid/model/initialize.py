"""Initial weights that no layout changes.

Each row of each parameter is drawn from its own stream, addressed by (seed, global name, component, global row). A rank draws the rows it
holds, so any cut over tensor, pipeline or data ranks, on a CPU or a GPU, starts from bitwise the same model. Streams are Philox-4x64
(Salmon et al. 2011): the name gives the key, the row the counter, so no stream is ever advanced past another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from megatron_hybrid.layers.parameters import Component, Declaration

_ROWS_PER_TASK = 1024


def initialize_parameters(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], *, seed: int, tensor_rank: int, tensor_ranks: int, num_threads: int
) -> None:
    """Fill every parameter in place from its declaration.

    Args:
        named_parameters: pairs of the global name (layers numbered through the whole model) and the local shard.
        seed: the run's seed.
        tensor_rank: this rank's place among ``tensor_ranks``.
        tensor_ranks: ranks that tensor-parallel dimensions are cut over.
        num_threads: CPU threads to draw with; they change nothing but the time.
    """
    with ThreadPoolExecutor(num_threads) as pool, torch.no_grad():
        for name, parameter in named_parameters:
            local = _draw_local(parameter.declaration, name, seed, tensor_rank, tensor_ranks, pool)
            parameter.copy_(torch.from_numpy(local))


def _draw_local(
    declaration: Declaration, name: str, seed: int, tensor_rank: int, tensor_ranks: int, pool: ThreadPoolExecutor
) -> np.ndarray:
    """The local shard, float32 (float64 for vectors, rounded once when stored)."""
    rows_cut = declaration.axis == 0
    components = declaration.components if rows_cut else (Component("", declaration.global_shape[0]),)
    parts = []
    for component in components:
        rows = _own_part(component.size, tensor_rank, tensor_ranks) if rows_cut else range(component.size)
        key = _stream_key(seed, f"{name}.{component.name}" if component.name else name)
        part = _draw_rows(declaration, key, component.size, rows, pool)
        if declaration.axis is not None and not rows_cut:
            columns = _own_part(declaration.global_shape[declaration.axis], tensor_rank, tensor_ranks)
            part = part.take(columns, axis=declaration.axis)
        parts.append(part)
    return np.concatenate(parts)


def _draw_rows(declaration: Declaration, key: np.ndarray, num_rows: int, rows: range, pool: ThreadPoolExecutor) -> np.ndarray:
    """The global rows ``rows`` of a component, whole in every other dimension."""
    row_shape = declaration.global_shape[1:]
    if not row_shape:
        # A vector is one row of its own stream: drawing scalar by scalar would be slow and gain nothing.
        whole = declaration.initializer(_stream(key, 0), (num_rows,))
        return whole[rows.start : rows.stop]
    values = np.empty((len(rows), *row_shape), np.float32)

    def fill(first: int) -> None:
        for index in range(first, min(first + _ROWS_PER_TASK, len(rows))):
            values[index] = declaration.initializer(_stream(key, rows[index]), row_shape)

    list(pool.map(fill, range(0, len(rows), _ROWS_PER_TASK)))
    return values


def _own_part(size: int, rank: int, num_ranks: int) -> range:
    assert size % num_ranks == 0, (size, num_ranks)
    share = size // num_ranks
    return range(rank * share, (rank + 1) * share)


def _stream_key(seed: int, name: str) -> np.ndarray:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, np.uint64)


def _stream(key: np.ndarray, row: int) -> np.random.Generator:
    # The row is the counter's third word: a row may draw 2^128 blocks before it meets the next.
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, row, 0], np.uint64)))
