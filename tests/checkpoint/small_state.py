"""A sharded state without a model: two tensors, one of them a copy on every rank, and something common."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

ROWS_PER_RANK = 24


def whole_tensors(step: int) -> dict[str, torch.Tensor]:
    """The values of a step: a tensor that is cut by rows, and one that is not."""
    generator = torch.Generator().manual_seed(step)
    return {"cut": torch.randn(4 * ROWS_PER_RANK, 5, generator=generator), "copied": torch.randn(7, generator=generator).bfloat16()}


def small_state(step: int) -> dict[str, Any]:
    """This rank's part of a step's state, for 1, 2 or 4 ranks."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    tensors = whole_tensors(step)
    rows = tensors["cut"].chunk(num_ranks)[rank].clone()
    model = {
        "cut": ShardedTensor.from_rank_offsets("cut", rows, (0, rank, num_ranks)),
        "copied": ShardedTensor.from_rank_offsets("copied", tensors["copied"], replica_id=rank),
    }
    moments = {0: {"exp_avg": ShardedTensor.from_rank_offsets("optimizer.exp_avg", 2 * rows, (0, rank, num_ranks))}}
    return {"model": model, "optimizer": {"state": moments, "param_groups": [{"lr": 0.1 * step}]}}


def is_step(loaded: dict[str, Any], step: int) -> bool:
    """Whether a loaded state is bit for bit what ``small_state(step)`` describes."""
    expected = small_state(step)
    pairs = [(loaded["model"][key], expected["model"][key].data) for key in ("cut", "copied")]
    if "optimizer" in loaded:
        pairs.append((loaded["optimizer"]["state"][0]["exp_avg"], expected["optimizer"]["state"][0]["exp_avg"].data))
        if loaded["optimizer"]["param_groups"] != expected["optimizer"]["param_groups"]:
            return False
    return all(here.dtype == there.dtype and torch.equal(here, there) for here, there in pairs)
