"""Writing a sharded state in megatron-core's torch_dist format.

The files are those that ``megatron.core.dist_checkpointing.save`` writes. The way there is our own composition of its parts and torch's.
In the stock one rank 0 alone writes the common state and the metadata while the other ranks wait in collectives, so that a full disk
becomes a hang; and its background writers either fork a process full of threads, or are spawned and then share the memory of host
tensors that training goes on to change.
"""

from __future__ import annotations

import io
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedStateDict, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.fully_parallel import distribute_main_replicas_with_precomputed_distribution
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.storage import WriteResult

from megatron_hybrid.checkpoint.agreement import failing_together, gather
from megatron_hybrid.checkpoint.manifest import FileFacts, measure
from megatron_hybrid.checkpoint.shards import ShardFacts

DATA_SUFFIX = ".distcp"
"""Files of shards; the name is torch's."""
# A tensor's record in a file has a pickled description and padding; metadata and manifest have an entry for it.
_OVERHEAD_BYTES_PER_ENTRY = 4096


@dataclass(frozen=True)
class Written:
    """What one rank wrote."""

    files: dict[str, FileFacts]
    shards: list[ShardFacts]
    results: list[WriteResult]


class ShardedWrite:
    """One checkpoint on its way to the disk: planned by all ranks, written by each in any thread, completed by one.

    Args:
        state: as megatron-core's ``save`` takes it; its factories are applied in place.
        directory: where the files go; must exist when ``write`` is called.
        snapshot: copy the tensors to host memory now, because they may change before ``write`` is done.
        group: all ranks.

    Raises:
        CheckpointError: the shards do not fit together; on all ranks.
    """

    def __init__(self, state: ShardedStateDict, directory: Path, *, snapshot: bool, group: dist.ProcessGroup | None = None) -> None:
        with failing_together(group):
            sharded, common = save_preprocess(state)
            _share_replicas(sharded)
            own = [entry for entry in nested_values(sharded) if is_main_replica(entry.replica_id)]
            if snapshot:
                own = [_snapshot(entry) for entry in own]
            self._tensors = [entry for entry in own if isinstance(entry, ShardedTensor)]
            self._common = io.BytesIO()
            torch.save(common, self._common)
            self._writer = FileSystemWriter(directory)
            self._planner = MCoreSavePlanner(flatten_state_dict=False)
            self._planner.set_up_planner(_by_key(own), is_coordinator=dist.get_rank(group) == 0)
            self._plan = self._planner.create_local_plan()
        plans = gather(self._plan, group)
        with failing_together(group):
            if dist.get_rank(group) == 0:
                _, self._metadata = self._planner.create_global_plan(plans)
        self._directory, self._file_prefix = directory, f"__{dist.get_rank(group)}_"

    @property
    def size_bytes(self) -> int:
        """Upper estimate of what this rank writes."""
        tensors = sum(tensor.data.nbytes for tensor in self._tensors)
        return tensors + len(self._common.getbuffer()) + _OVERHEAD_BYTES_PER_ENTRY * (1 + len(self._plan.items))

    def write(self) -> Written:
        """Write this rank's shards to disk, and take their facts; not collective.

        Raises:
            OSError, RuntimeError: the disk refused.
        """
        files, results = {}, []
        if self._plan.items:
            plan = replace(self._plan, storage_data=_StoragePrefix(self._file_prefix))
            results = self._writer.write_data(self._planner.finish_plan(plan), self._planner).wait()
            files = {name: measure(self._directory / name) for name in {result.storage_data.relative_path for result in results}}
        return Written(files, [ShardFacts.of(tensor) for tensor in self._tensors], results)

    def complete(self, written: list[Written]) -> dict[str, FileFacts]:
        """Write the common state and the metadata that joins the ranks' files, and return the facts of these; on rank 0 alone.

        Args:
            written: what every rank wrote, by rank.
        """
        self._writer.finish(self._metadata, [each.results for each in written])
        save_config(CheckpointingConfig("torch_dist", 1), str(self._directory))
        (self._directory / COMMON_STATE_FNAME).write_bytes(self._common.getbuffer())
        return {name: measure(self._directory / name) for name in (".metadata", "metadata.json", COMMON_STATE_FNAME)}


def _share_replicas(sharded: ShardedStateDict) -> None:
    """Choose which rank writes what several ranks hold, so that all write about as much; marks the chosen as the main replicas."""
    ranks = dist.group.WORLD
    distribute_main_replicas_with_precomputed_distribution(sharded, ranks, determine_main_replica_uniform_distribution(sharded, ranks))


def _snapshot(entry: ShardedBase) -> ShardedBase:
    """Copy a tensor to host memory; other objects are serialised by the planner anyway."""
    return replace(entry, data=entry.data.detach().to("cpu", copy=True)) if isinstance(entry, ShardedTensor) else entry


def _by_key(entries: list[ShardedBase]) -> dict[str, object]:
    """The state as torch's planner takes it: a rank's shards of one tensor are one entry."""
    grouped = defaultdict(list)
    for entry in entries:
        grouped[entry.unique_key if isinstance(entry, ShardedObject) else entry.key].append(entry)
    return mcore_to_pyt_state_dict(grouped)
