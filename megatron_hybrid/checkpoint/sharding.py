"""From parameter declarations to megatron-core's sharded tensors, under Megatron-LM's key names.

A plainly cut parameter is one sharded tensor. One made of components, such as a Mamba-2 in_proj, becomes a sharded tensor per component
(``in_proj.weight.z``, ``.x``, ``.B``, ``.C``, ``.dt``): each is contiguous in the whole model although no rank's rows are, so any other
tensor-parallel cut can read it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_hybrid.layers.parameters import Declaration


def shard_parameters(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], tensor_group: ProcessGroup, data_group: ProcessGroup
) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """Describe every parameter's place in the whole model, as megatron-core's distributed checkpoints want it.

    Args:
        named_parameters: global names and local shards; names become the keys.
        tensor_group: ranks that tensor-parallel dimensions are cut over.
        data_group: ranks that hold copies.
    """
    cut = (tensor_group.rank(), tensor_group.size())
    return {name: _shard(name, parameter, parameter.declaration, cut, data_group.rank()) for name, parameter in named_parameters}


def shard_copies(
    tensors: Mapping[str, Tensor], tensor_group: ProcessGroup, data_group: ProcessGroup, *, differ_by_data_rank: bool
) -> dict[str, ShardedTensor]:
    """Describe tensors that all tensor ranks hold alike, and all data ranks too.

    Where the data ranks' tensors differ, the saved tensor has a first dimension for the data ranks.
    """
    tensor_rank, data_rank = tensor_group.rank(), data_group.rank()
    if differ_by_data_rank:
        place = (0, data_rank, data_group.size())
        return {
            key: ShardedTensor.from_rank_offsets(key, tensor[None], place, replica_id=(0, tensor_rank, 0))
            for key, tensor in tensors.items()
        }
    return {key: ShardedTensor.from_rank_offsets(key, tensor, replica_id=(0, tensor_rank, data_rank)) for key, tensor in tensors.items()}


def _shard(
    name: str, parameter: torch.nn.Parameter, declaration: Declaration, cut: tuple[int, int], data_rank: int
) -> ShardedTensor | ShardedTensorFactory:
    if declaration.axis is None:
        return ShardedTensor.from_rank_offsets(name, parameter, replica_id=(0, cut[0], data_rank))
    replica_id = (0, 0, data_rank)
    if len(declaration.components) == 1:
        return ShardedTensor.from_rank_offsets(name, parameter, (declaration.axis, *cut), replica_id=replica_id)
    return _shard_components(name, parameter, declaration, cut, replica_id)


def _shard_components(
    name: str, parameter: torch.nn.Parameter, declaration: Declaration, cut: tuple[int, int], replica_id: ReplicaId
) -> ShardedTensorFactory:
    local_sizes = [component.size // cut[1] for component in declaration.components]

    @torch.no_grad()
    def build(key: str, tensor: Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> list[ShardedTensor]:
        assert flattened_range is None, "optimizer state of component-wise parameters is saved in model shape"
        return [
            ShardedTensor.from_rank_offsets(f"{key}.{component.name}", part, (declaration.axis, *cut), replica_id=replica_id)
            for component, part in zip(declaration.components, tensor.split(local_sizes, declaration.axis), strict=True)
        ]

    @torch.no_grad()
    def merge(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, declaration.axis)

    return ShardedTensorFactory(name, parameter, build, merge, replica_id)
