"""Reading a sharded state back, into any layout, and checking that it is what was written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, StateDict, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.dist_checkpointing.utils import extract_sharded_base

from megatron_hybrid.checkpoint.agreement import CheckpointError, failing_together, gather
from megatron_hybrid.checkpoint.manifest import Manifest, check_contents, check_sizes, verify_files
from megatron_hybrid.checkpoint.shards import ShardFacts, join_shards
from megatron_hybrid.checkpoint.writing import DATA_SUFFIX

_NAMES_SHOWN = 3


def load(path: Path, state: ShardedStateDict, *, group: dist.ProcessGroup | None = None) -> StateDict:
    """Load the checkpoint in directory ``path`` into the layout that ``state`` describes; collective over all ranks.

    What was read is compared with the manifest tensor by tensor: the digests of all ranks' shards must add up to the saved ones, bit
    for bit. Files that hold nothing of ``state`` are only looked at for their size; ``CheckpointStore.newest`` reads everything.

    Args:
        path: a complete checkpoint, in any layout.
        state: sections of a sharded state, such as {"model": ..., "optimizer": ...} or {"model": ...} alone. Its tensors say what is
            wanted and are left as they are.
        group: all ranks, to agree on errors.

    Returns:
        The loaded values in the structure of ``state``: new tensors in host memory, in the dtypes they were saved in.

    Raises:
        ValueError: the checkpoint does not have what ``state`` asks for.
        CheckpointError: the checkpoint is damaged; the message names the file.
    """
    with failing_together(group):
        manifest = Manifest.read(path)
        check_sizes(path, manifest)
        # Before they are unpickled.
        check_contents(path, manifest, [name for name in manifest.files if not name.endswith(DATA_SUFFIX)])
        wanted, local_only, factories = load_preprocess(state)
        tensors, own_common = extract_sharded_base(wanted)
        saved_common = TorchCommonLoadStrategy().load_common(str(path))
        common = {section: saved_common[section] for section in state if section in saved_common}
        _check_wanted(path, manifest, nested_values(tensors), own_common, common)
        dict_list_map_inplace(lambda tensor: _as_saved(tensor, manifest), tensors)
    try:
        with failing_together(group):
            loaded = TorchDistLoadShardedStrategy().load(tensors, path)
        _check_digests(manifest, tensors, group)
    except CheckpointError as error:
        # Find the file that did it.
        verify_files(path, group)
        raise CheckpointError(f"{path} could not be loaded, though its files are intact: {error}") from error
    merge(common, local_only)
    merge(common, loaded)
    return apply_factory_merges(common, factories)


def _check_wanted(path: Path, manifest: Manifest, wanted: Iterable[ShardedTensor], own_common: StateDict, saved_common: StateDict) -> None:
    missing, other_shapes = [], []
    for tensor in wanted:
        facts = manifest.tensors.get(tensor.key)
        if facts is None:
            missing.append(tensor.key)
        elif facts.shape != tuple(tensor.global_shape):
            other_shapes.append(f"{tensor.key} is {list(facts.shape)} there and {list(tensor.global_shape)} here")
    if missing:
        kind = "of another architecture, or its optimizer state is of another kind (plain or distributed, fp32 or bf16)"
        raise ValueError(f"{path} does not have {_shortened(missing)}: it is {kind}")
    if other_shapes:
        raise ValueError(f"{path} is of another architecture: {_shortened(other_shapes)}")
    for section, entries in own_common.items():
        if entries.keys() - saved_common.get(section, {}).keys():
            raise ValueError(
                f"{path} has the {section} state of another kind (plain or distributed, fp32 or bf16), which is not converted; "
                "keep these options, or start a new run from the weights (checkpoint.initialize_from)"
            )


def _shortened(texts: list[str]) -> str:
    more = len(texts) - _NAMES_SHOWN
    return ", ".join(texts[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _as_saved(tensor: ShardedTensor, manifest: Manifest) -> ShardedTensor:
    """The same place, to be filled with a new tensor of the saved dtype: nothing live is overwritten before it is checked, nor rounded."""
    return replace(tensor, data=None, dtype=getattr(torch, manifest.tensors[tensor.key].dtype))


def _check_digests(manifest: Manifest, tensors: ShardedStateDict, group: dist.ProcessGroup | None) -> None:
    with failing_together(group):
        own = [ShardFacts.of(tensor) for tensor in nested_values(tensors)]
    shards = [shard for rank_shards in gather(own, group) for shard in rank_shards]
    with failing_together(group):
        for key, facts in join_shards(shards).items():
            if facts != manifest.tensors[key]:
                raise CheckpointError(f"{key} is not what was saved: its digest differs")
