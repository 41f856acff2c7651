"""A trained model that is only run, never trained: a teacher, or a model that is scored. In any layout, with weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.transformer import TransformerConfig

from megatron_hybrid.checkpoint import CheckpointError, check_header, load, read_header
from megatron_hybrid.checkpoint.sharding import shard_parameters
from megatron_hybrid.config import RunConfig
from megatron_hybrid.layers.specs import ops_for
from megatron_hybrid.layout.stages import plan_stages
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.substrate.context import Substrate


def load_frozen_chunks(run: RunConfig, checkpoint: Path, config: TransformerConfig, substrate: Substrate) -> list[HybridModel]:
    """Return this rank's chunks of a checkpoint's model, in eval mode and without gradients; collective over all ranks.

    Args:
        run: has the model, and the layout that it is cut for; nothing of it is in float8.
        checkpoint: where the weights are, written in whatever layout.
        config: megatron-core's settings for this model (``build_transformer_config(run, substrate)``).
        substrate: this rank.

    Raises:
        ValueError: the checkpoint is of another architecture, or damaged.
    """
    check_header(read_header(checkpoint), model=run.model.architecture())
    stages = plan_stages(run.model, run.parallel, run.data.sequence_length)
    chunks = []
    for virtual_stage in range(substrate.pipeline_rank, len(stages), run.parallel.pipeline):
        chunk = HybridModel(
            run.model,
            config,
            ops_for(substrate.device, config.params_dtype, choices=run.kernels, chunk_length=run.model.mamba_chunk_size),
            layer_range=stages[virtual_stage],
            is_first_stage=virtual_stage == 0,
            is_last_stage=virtual_stage == len(stages) - 1,
        )
        chunks.append(chunk.to(substrate.device).eval().requires_grad_(False))
    sharded = {}
    for chunk in chunks:
        sharded |= shard_parameters(chunk.named_global_parameters(), substrate.tensor_group, substrate.data_group)
    try:
        weights = load(checkpoint, {"model": sharded}, group=substrate.control_group)["model"]
    except CheckpointError as error:
        raise ValueError(f"{error}; use another checkpoint") from error
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_global_parameters():
                parameter.copy_(weights[name])
    return chunks
