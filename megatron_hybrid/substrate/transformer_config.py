"""A run's settings in megatron-core's words: the TransformerConfig that its layers and schedules read."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.transformer import TransformerConfig

from megatron_hybrid.config.schema import RunConfig
from megatron_hybrid.substrate.context import Substrate


def build_transformer_config(config: RunConfig, substrate: Substrate) -> TransformerConfig:
    """Return one rank's settings for a hybrid language model. Recomputation is the HybridStack's, so megatron-core is not told of it."""
    model = config.model
    return TransformerConfig(
        # Shapes
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        # Our MLP layers take their widths from the model; megatron-core's settings know one
        ffn_hidden_size=max(model.ffn_hidden_sizes, default=model.ffn_hidden_size),
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        is_hybrid_model=True,
        mamba_num_heads=model.mamba_num_heads,
        mamba_head_dim=model.mamba_head_dim,
        mamba_num_groups=model.mamba_num_groups,
        mamba_state_dim=model.mamba_state_dim,
        # Layer kinds of Nemotron-H: RMSNorm, squared ReLU without a gate, no biases, no dropout
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        activation_func=squared_relu,
        gated_linear_unit=False,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        variable_seq_lengths=False,
        **common_settings(config, substrate),
    )


def common_settings(config: RunConfig, substrate: Substrate) -> dict[str, Any]:
    """What does not depend on the model: loss, precision, layout, kernels.

    One setting guards against megatron-core: interleaved stages need unbatched, overlapped point-to-point transfers, since with batched
    ones at two pipeline ranks its losses are silently wrong (its own trainer refuses them, the core does not).
    """
    parallel = config.parallel
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    interleaved = parallel.virtual_pipeline > 1
    on_cuda = substrate.device.type == "cuda"
    return {
        # The loss is a sum over tokens, divided once by the tokens of the whole step, so that no cut of the batch changes it
        "calculate_per_token_loss": True,
        # Precision
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": config.train.precision == "bf16",
        # Layout
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if interleaved else None,
        "sequence_parallel": parallel.sequence_parallel,
        # Interleaved stages free an output before its send was waited for; gloo still reads it then, and the next stage gets garbage
        "deallocate_pipeline_outputs": not (interleaved and substrate.backend == "gloo"),
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # Kernels: on a CPU the embedding's ordinary backward is deterministic, and faster than the one this switch selects
        "deterministic_mode": config.runtime.deterministic and on_cuda,
        "gradient_accumulation_fusion": False,
        "transformer_impl": "local",
        "cuda_graph_scope": [],
    }
