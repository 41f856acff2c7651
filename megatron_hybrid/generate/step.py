"""One token through a stage of the model, for every sequence at once: the layers' parameters, and the decoding operations between them.

The same numbers as the layers' own forward with caches (tests/generate/test_step.py), without the sequence dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from torch import Tensor

from megatron_hybrid.layers.attention import AttentionLayer
from megatron_hybrid.layers.linear import NormColumnParallelLinear, ResidualRowParallelLinear
from megatron_hybrid.layers.mamba import MambaLayer
from megatron_hybrid.layers.mlp import MlpLayer
from megatron_hybrid.layers.sequence import AttentionCache, Cache, MambaCache
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.ops.decode import DecodeOps
from megatron_hybrid.ops.rope import apply_rope, rope_tables


@dataclass(frozen=True)
class Here:
    """Where the sequences stand."""

    position_B: Tensor
    """int64, tokens before this one."""
    is_active_B: Tensor
    """bool; the caches of others are left alone."""
    rope_cos_sin: tuple[Tensor, Tensor] | None
    """Of the positions, fp32 [B, 1, R] each; None without position embedding."""


def describe_position(model: HybridModel, position_B: Tensor, is_active_B: Tensor) -> Here:
    """Prepare once what every layer needs to know."""
    if model.rope is None:
        return Here(position_B, is_active_B, None)
    cos_BR, sin_BR = rope_tables(position_B, *model.rope)
    return Here(position_B, is_active_B, (cos_BR[:, None], sin_BR[:, None]))


def embed(model: HybridModel, tokens_B: Tensor) -> Tensor:
    """The first stage's residual stream, [B, D]."""
    return model.embedding(tokens_B[:, None]).squeeze(0)


def run_layers(model: HybridModel, hidden_BD: Tensor, caches: Sequence[Cache], here: Here, ops: DecodeOps) -> Tensor:
    """This stage's layers, [B, D] to [B, D], without the final norm; the caches take in the token."""
    for layer, cache in zip(model.decoder.layers, caches, strict=True):
        hidden_BD = run_layer(layer, hidden_BD, cache, here, ops)
    return hidden_BD


def run_layer(layer: torch.nn.Module, hidden_BD: Tensor, cache: Cache, here: Here, ops: DecodeOps) -> Tensor:
    """One layer, [B, D] to [B, D], residual included."""
    return _LAYERS[type(layer)](layer, hidden_BD, cache, here, ops)


def logits_of(model: HybridModel, hidden_BD: Tensor, ops: DecodeOps) -> Tensor:
    """Final norm and output layer of the last stage: [B, V] in the working precision, gathered over the tensor ranks."""
    norm, head = model.decoder.final_norm, model.output_layer
    local_BV = ops.norm_linear(hidden_BD, norm.weight, head.weight, norm.eps)
    return gather_from_tensor_model_parallel_region(local_BV, group=get_tensor_model_parallel_group())[:, : head.vocab_size]


def _mamba(layer: MambaLayer, hidden_BD: Tensor, cache: MambaCache, here: Here, ops: DecodeOps) -> Tensor:
    mixer = layer.mixer
    y_BI = ops.mamba_step(
        _into_block(mixer.in_proj, hidden_BD, ops),
        cache.conv_ring_BWC,
        cache.ssm_state_BHPN,
        here.position_B,
        here.is_active_B,
        conv_weight_CW=mixer.conv1d.weight.squeeze(1),
        conv_bias_C=mixer.conv1d.bias,
        A_log_H=mixer.A_log,
        D_H=mixer.D,
        dt_bias_H=mixer.dt_bias,
        norm_weight_I=mixer.norm.weight,
        num_groups=mixer.num_groups,
        eps=mixer.norm.eps,
    )
    return _out_of_block(mixer.out_proj, y_BI, hidden_BD, ops)


def _attention(layer: AttentionLayer, hidden_BD: Tensor, cache: AttentionCache, here: Here, ops: DecodeOps) -> Tensor:
    attention = layer.self_attention
    qkv_BE = _into_block(attention.linear_qkv, hidden_BD, ops)
    q_BHP, k_BGP, v_BGP = attention.split_heads(qkv_BE)
    if here.rope_cos_sin is not None:
        q_BHP, k_BGP = (apply_rope(heads[:, None], *here.rope_cos_sin).squeeze(1) for heads in (q_BHP, k_BGP))
    attended_BHP = ops.attention_step(q_BHP, k_BGP, v_BGP, cache.key_BSGP, cache.value_BSGP, here.position_B, here.is_active_B)
    return _out_of_block(attention.linear_proj, attended_BHP.flatten(1), hidden_BD, ops)


def _mlp(layer: MlpLayer, hidden_BD: Tensor, cache: None, here: Here, ops: DecodeOps) -> Tensor:
    inner_BF = _into_block(layer.mlp.linear_fc1, hidden_BD, ops, squared_relu=True)
    return _out_of_block(layer.mlp.linear_fc2, inner_BF, hidden_BD, ops)


_LAYERS = {MambaLayer: _mamba, AttentionLayer: _attention, MlpLayer: _mlp}


def _into_block(linear: NormColumnParallelLinear, hidden_BD: Tensor, ops: DecodeOps, *, squared_relu: bool = False) -> Tensor:
    return ops.norm_linear(hidden_BD, linear.layer_norm_weight, linear.weight, linear.eps, squared_relu=squared_relu)


def _out_of_block(linear: ResidualRowParallelLinear, y_BI: Tensor, hidden_BD: Tensor, ops: DecodeOps) -> Tensor:
    """Add the block's result to the residual stream, summed over the tensor ranks."""
    group = get_tensor_model_parallel_group()
    if group.size() == 1:
        return ops.linear(y_BI, linear.weight, hidden_BD)
    return hidden_BD + reduce_from_tensor_model_parallel_region(ops.linear(y_BI, linear.weight, None), group=group)
