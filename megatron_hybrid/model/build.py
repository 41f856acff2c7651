"""From a configuration to the model chunks of one rank."""

from __future__ import annotations

from megatron.core.transformer import TransformerConfig

from megatron_hybrid.config import RunConfig
from megatron_hybrid.layers.float8 import use_float8
from megatron_hybrid.layers.specs import ops_for
from megatron_hybrid.layout.float8 import LINEARS, plan_float8
from megatron_hybrid.layout.pattern import ATTENTION, MAMBA, MLP
from megatron_hybrid.layout.stages import plan_stages
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.model.initialize import initialize_parameters
from megatron_hybrid.substrate.context import Substrate


def called_operations(run: RunConfig) -> set[str]:
    """The operations of ``layers.specs.OPERATIONS`` that training and validation call, on one stage or another.

    A Mamba-2 layer runs its core in one; convolution, scan and norm alone are for generation. Linears in float8 have products of their
    own, and an MLP all in float8 its activation too, but for the steps that ``fp8.shadow_every_steps`` evaluates without.
    """
    always_in_float8 = run.fp8.recipe != "off" and run.fp8.shadow_every_steps is None
    plan = plan_float8(run.model, run.parallel.tensor, run.fp8) if always_in_float8 else ((),) * run.model.num_layers
    called = {"embedding", "rms_norm", "linear_cross_entropy"}
    for kind, planned in zip(run.model.layer_kinds, plan, strict=True):
        if set(planned) != set(LINEARS[kind]):
            called |= {"linear", "squared_relu"} if kind == MLP else {"linear"}
        called |= {MAMBA: {"mamba_core"}, ATTENTION: {"attention"}, MLP: set()}[kind]
    return called


def build_chunks(run: RunConfig, config: TransformerConfig, substrate: Substrate) -> list[HybridModel]:
    """Make and initialise the chunks this rank holds, in model order: one, or ``virtual_pipeline`` of them under interleaving.

    Under ``checkpoint.initialize_from`` the weights are left as memory is found: the trainer loads them.

    Virtual stage v lives on pipeline rank v % pipeline, as its chunk v // pipeline.
    """
    stages = plan_stages(run.model, run.parallel, run.data.sequence_length)
    own = range(substrate.pipeline_rank, len(stages), run.parallel.pipeline)
    ops = ops_for(substrate.device, config.params_dtype, choices=run.kernels, chunk_length=run.model.mamba_chunk_size)
    chunks = []
    for virtual_stage in own:
        chunk = HybridModel(
            run.model,
            config,
            ops,
            layer_range=stages[virtual_stage],
            is_first_stage=virtual_stage == 0,
            is_last_stage=virtual_stage == len(stages) - 1,
            recompute=run.parallel.recompute,
        )
        if run.fp8.recipe != "off":
            first, end = stages[virtual_stage]
            layers = [(f"decoder.layers.{index}", layer) for index, layer in enumerate(chunk.decoder.layers, first)]
            use_float8(layers, plan_float8(run.model, run.parallel.tensor, run.fp8)[first:end], run.fp8, substrate.device)
        chunk.to(substrate.device)
        # Drawing takes seconds per hundred million parameters, which is lost where a checkpoint's weights follow.
        if run.checkpoint.initialize_from is None:
            initialize_parameters(
                chunk.named_global_parameters(),
                seed=run.seed,
                tensor_rank=substrate.tensor_rank,
                tensor_ranks=run.parallel.tensor,
                num_threads=substrate.num_threads,
            )
        chunks.append(chunk)
    return chunks
