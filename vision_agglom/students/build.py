"""From a configuration to the student's chunks on one rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer import TransformerConfig

from megatron_hybrid.model.initialize import initialize_parameters
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.transformer_config import common_settings
from vision_agglom.config.schema import VisionConfig, block_ranges
from vision_agglom.heads import HeadShape
from vision_agglom.students.damp import DampNoise
from vision_agglom.students.layers import CutLinear
from vision_agglom.students.ops import vision_ops
from vision_agglom.students.vit import StudentModel


def build_transformer_config(run: VisionConfig, substrate: Substrate) -> TransformerConfig:
    """The run's settings in megatron-core's words."""
    student = run.student
    return TransformerConfig(
        num_layers=student.num_layers,
        hidden_size=student.hidden_size,
        ffn_hidden_size=student.ffn_hidden_size,
        num_attention_heads=student.num_attention_heads,
        kv_channels=student.head_dim,
        normalization="LayerNorm",
        layernorm_epsilon=student.norm_eps,
        add_bias_linear=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=student.init_std,
        # Micro-batches differ in resolution: pipeline stages tell each other the shape.
        variable_seq_lengths=run.parallel.pipeline > 1,
        **common_settings(run, substrate),
    )


def build_student_chunks(
    run: VisionConfig, heads: Sequence[HeadShape], config: TransformerConfig, substrate: Substrate
) -> list[StudentModel]:
    """Make and initialise the chunks this rank holds, in model order."""
    ranges = block_ranges(run.student.num_layers, run.parallel)
    own = range(substrate.pipeline_rank, len(ranges), run.parallel.pipeline)
    chunks = []
    for stage in own:
        chunk = StudentModel(
            run.student,
            heads,
            run.num_prefix_tokens,
            config,
            vision_ops(substrate.device),
            seed=run.seed,
            layer_range=ranges[stage],
            is_first_stage=stage == 0,
            is_last_stage=stage == len(ranges) - 1,
            recompute=run.parallel.recompute,
        )
        chunk.to(substrate.device)
        initialize_parameters(
            chunk.named_global_parameters(),
            seed=run.seed,
            tensor_rank=substrate.tensor_rank,
            tensor_ranks=run.parallel.tensor,
            num_threads=substrate.num_threads,
        )
        chunks.append(chunk)
    for chunk in chunks:
        _prepare_linears(chunk, run, substrate)
    return chunks


def _prepare_linears(chunk: StudentModel, run: VisionConfig, substrate: Substrate) -> None:
    """Start spectral scales where they change nothing, and give each weight its noise."""
    for name, module in chunk.named_modules():
        if not isinstance(module, CutLinear):
            continue
        if module.spectral is not None:
            module.spectral.start_at_identity(module.weight)
        if run.student.damp_std:
            module.damp = DampNoise(
                chunk.global_name(name),
                run.student.damp_std,
                run.seed,
                axis=module.axis,
                tensor_rank=substrate.tensor_rank,
                tensor_ranks=substrate.tensor_size,
            )


def update_spectral(chunks: Sequence[torch.nn.Module]) -> None:
    """One power iteration for every weight, after each optimizer step. Collective over the tensor ranks."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, CutLinear) and module.spectral is not None:
                module.spectral.update(module.weight)
