"""From shards, each known to the rank that holds it, to facts about whole tensors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_hybrid.checkpoint.agreement import CheckpointError
from megatron_hybrid.checkpoint.digest import MODULUS, shard_digest
from megatron_hybrid.checkpoint.manifest import TensorFacts


@dataclass(frozen=True)
class ShardFacts:
    """A shard's place, and its part of its tensor's digest."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]
    dtype: str
    digest: int

    @classmethod
    def of(cls, tensor: ShardedTensor) -> ShardFacts:
        """Read the shard's data and return its facts."""
        digest = shard_digest(tensor.data, tensor.global_shape, tensor.global_offset)
        place = tuple(tensor.local_shape), tuple(tensor.global_offset), tuple(tensor.global_shape)
        return cls(tensor.key, *place, str(tensor.dtype).removeprefix("torch."), digest)


def join_shards(shards: Iterable[ShardFacts]) -> dict[str, TensorFacts]:
    """Join all ranks' shards into whole tensors, by key.

    A shard may come from several ranks (replicas): they must be bitwise equal, and count once.

    Raises:
        CheckpointError: replicas differ, shards of one tensor contradict each other, or they do not add up to the whole; the message
            names the tensor.
    """
    by_key: dict[str, dict[tuple, ShardFacts]] = defaultdict(dict)
    for shard in shards:
        known = by_key[shard.key].setdefault((shard.offset, shard.shape), shard)
        if known != shard:
            raise CheckpointError(f"{shard.key}: ranks hold different values of the same shard at {shard.offset}")
    return {key: _join(key, list(places.values())) for key, places in by_key.items()}


def _join(key: str, shards: list[ShardFacts]) -> TensorFacts:
    kinds = {(shard.global_shape, shard.dtype) for shard in shards}
    num_elements = sum(math.prod(shard.shape) for shard in shards)
    if len(kinds) > 1 or num_elements != math.prod(shards[0].global_shape):
        raise CheckpointError(f"{key}: shards of {num_elements} elements do not make up a tensor of (shape, dtype) {sorted(kinds)}")
    return TensorFacts(shards[0].global_shape, shards[0].dtype, f"{sum(shard.digest for shard in shards) % MODULUS:016x}")
