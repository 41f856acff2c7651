"""A digest of a tensor that no sharding changes: each shard's part is computed where the shard is, and the parts are added.

An element with bits b at position p of the whole tensor (in row-major order) contributes mix(b + K p) modulo 2^64, where
mix(v) = K' (v xor (v >> 30)) with K' odd is a bijection (the first step of SplitMix64's finalizer, Steele et al. 2014). A sum modulo
2^64 does not depend on the order of its terms, so that, unlike a norm, the digest needs no tolerance. It changes with any single
element, and also when right values stand in wrong places, which a norm would not notice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MODULUS = 1 << 64
_POSITION_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MIX_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(30)
_BITS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64)}
# The intermediate arrays stay in the cache.
_ELEMENTS_PER_BLOCK = 1 << 15


def shard_digest(shard: Tensor, global_shape: Sequence[int], global_offset: Sequence[int]) -> int:
    """Return the shard's part of its tensor's digest; the parts of all shards add up to it modulo 2^64.

    Args:
        shard: the elements, of any real dtype, on any device.
        global_shape: shape of the whole tensor, with as many dimensions as the shard.
        global_offset: index of the shard's first element in it.
    """
    if shard.ndim == 0:
        shard, global_shape, global_offset = shard.reshape(1), (1,), (0,)
    if shard.numel() == 0:
        return 0
    num_columns = shard.shape[-1]
    signed, unsigned = _BITS[shard.element_size()]
    bits_RC = shard.detach().cpu().contiguous().view(signed).reshape(-1, num_columns).numpy().view(unsigned)
    rows_R = _row_starts(shard.shape[:-1], global_shape, global_offset) * _POSITION_FACTOR
    columns_C = np.arange(num_columns, dtype=np.uint64) * _POSITION_FACTOR
    total = 0
    num_rows = max(1, _ELEMENTS_PER_BLOCK // num_columns)
    for first in range(0, len(bits_RC), num_rows):
        block = slice(first, first + num_rows)
        mixed_RC = rows_R[block, None] + columns_C
        mixed_RC += bits_RC[block]
        mixed_RC ^= mixed_RC >> _SHIFT
        mixed_RC *= _MIX_FACTOR
        total += int(mixed_RC.sum())
    return total % MODULUS


def _row_starts(leading_shape: Sequence[int], global_shape: Sequence[int], global_offset: Sequence[int]) -> np.ndarray:
    """Position of the first element of each of the shard's rows, a row being its last dimension."""
    starts = np.array([global_offset[-1]], dtype=np.uint64)
    for axis, size in enumerate(leading_shape):
        first, stride = global_offset[axis], math.prod(global_shape[axis + 1 :])
        starts = (starts[:, None] + np.arange(first, first + size, dtype=np.uint64) * np.uint64(stride)).reshape(-1)
    return starts
