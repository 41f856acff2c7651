"""From a configuration to the student's chunks on one rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.transformer import TransformerConfig

from megatron_hybrid.layers.float8 import use_float8
from megatron_hybrid.layout.float8 import DIMENSION_UNIT
from megatron_hybrid.model.initialize import initialize_parameters
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.transformer_config import common_settings
from vision_agglom.config.schema import VisionConfig, block_ranges, loss_terms
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
        # There are no experts; megatron-core still asks for a dispatcher that could take varying lengths.
        moe_token_dispatcher_type="alltoall",
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
            vision_ops(substrate.device, config.params_dtype),
            seed=run.seed,
            layer_range=ranges[stage],
            is_first_stage=stage == 0,
            is_last_stage=stage == len(ranges) - 1,
            recompute=run.parallel.recompute,
            num_uncertainties=len(loss_terms(run)) if run.loss.balance == "uncertainty" else 0,
            length_multiple=length_multiple(run),
        )
        if run.fp8.recipe != "off":
            names = [f"blocks.{index}" for index in range(*ranges[stage])]
            plan = plan_float8(run)[ranges[stage][0] : ranges[stage][1]]
            use_float8(zip(names, chunk.blocks, strict=True), plan, run.fp8, substrate.device)
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


def length_multiple(run: VisionConfig) -> int:
    """What the number of tokens is filled up to: sequence parallelism cuts it, float8 products need multiples of 16."""
    tensor_ranks = run.parallel.tensor if run.parallel.sequence_parallel else 1
    return tensor_ranks if run.fp8.recipe == "off" else math.lcm(tensor_ranks, DIMENSION_UNIT)


def plan_float8(run: VisionConfig) -> list[tuple[str, ...]]:
    """Linears in float8, of each block of the whole student.

    Raises:
        ValueError: a linear's part on a rank has sides that float8 products cannot take.
    """
    student, tensor = run.student, run.parallel.tensor
    inner = student.ffn_hidden_size // tensor
    sides = {
        "linear_qkv": (3 * student.hidden_size // tensor, student.hidden_size),
        "linear_proj": (student.hidden_size, student.hidden_size // tensor),
        "linear_fc1": (inner * (2 if student.mlp == "swiglu" else 1), student.hidden_size),
        "linear_fc2": (student.hidden_size, inner),
    }
    planned = tuple(name for name in sides if name in run.fp8.linears)
    for name in planned:
        if any(side % DIMENSION_UNIT for side in sides[name]):
            raise ValueError(
                f"fp8: {name} is {sides[name][0]} x {sides[name][1]} per rank at parallel.tensor={tensor}, and float8 needs multiples "
                f"of {DIMENSION_UNIT}; change the student (such as ffn_hidden_size), the layout, or take it out of fp8.linears"
            )
    first, end = run.fp8.bf16_layers_at_start, student.num_layers - run.fp8.bf16_layers_at_end
    return [planned if first <= index < end else () for index in range(student.num_layers)]


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
