"""What a model takes in memory while it generates: weights, KV cache, SSM and convolution state, activations. Pure arithmetic.

Weights count at any number of bits per value, scales included: NVFP4 is 4 bits and an 8-bit scale for each 16 values, 4.5 bits. At 4.5
bits the 56,324,350,464 parameters of Nemotron-H 56B are 29.51 GiB, the paper's 29.5. The paper gives no formula for the rest. Here it is

    KV cache      2 x KV heads x head_dim values per token and attention layer
    SSM state     heads x head_dim x state values per sequence and Mamba layer
    conv state    (taps - 1) x channels values per sequence and Mamba layer
    activations   of one layer while the prompt is read in chunks: the residual stream and its norm, and what the widest layer holds
                  between its two linears (projection and result), for every token of a chunk

and every sum is linear in the layers, apart from the widest one of those that there are, so that a search needs the bytes of one layer of
each kind and width, and the largest activations among them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_hybrid.layout.parameters import num_embedding_parameters, num_head_parameters, num_layer_parameters
from megatron_hybrid.layout.pattern import ATTENTION, MAMBA, MLP
from megatron_hybrid.layout.shape import (
    HybridShape,
    attention_inner_size,
    attention_projection_size,
    mamba_conv_channels,
    mamba_projection_size,
)
from tools.minipuzzle.config import MemoryConfig

GIB = 2**30


@dataclass(frozen=True)
class MemoryUse:
    """Bytes by purpose."""

    weights: float = 0.0
    kv_cache: float = 0.0
    ssm_state: float = 0.0
    conv_state: float = 0.0
    activations: float = 0.0

    def __add__(self, other: MemoryUse) -> MemoryUse:
        return MemoryUse(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def total(self) -> float:
        """All of it, in bytes."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def total_gib(self) -> float:
        """All of it, in GiB (2^30 bytes)."""
        return self.total / GIB

    def describe(self) -> str:
        """One line for people.

        >>> MemoryUse(weights=3 * GIB, kv_cache=GIB).describe()
        '4 GiB: weights 3, kv_cache 1, ssm_state 0, conv_state 0, activations 0'
        """
        return f"{self.total_gib:.4g} GiB: " + ", ".join(f"{field.name} {getattr(self, field.name) / GIB:.4g}" for field in fields(self))


def layer_memory(shape: HybridShape, kind: str, setting: MemoryConfig) -> MemoryUse:
    """Return what one more layer of ``kind`` takes, activations (which layers share) left out."""
    weights = num_layer_parameters(shape, kind) * setting.weight_bits / 8
    if kind == ATTENTION:
        values = 2 * shape.num_kv_heads * shape.head_dim * setting.context_tokens * setting.batch_size
        return MemoryUse(weights, kv_cache=values * setting.kv_bits / 8)
    if kind == MAMBA:
        state = shape.mamba_inner_size * shape.mamba_state_dim * setting.batch_size
        taps = (shape.mamba_conv_width - 1) * mamba_conv_channels(shape) * setting.batch_size
        return MemoryUse(weights, ssm_state=state * setting.ssm_state_bits / 8, conv_state=taps * setting.activation_bits / 8)
    return MemoryUse(weights)


def fixed_memory(shape: HybridShape, setting: MemoryConfig) -> MemoryUse:
    """Return what does not change with the layers: embedding, final norm and output layer, and the residual stream with its norm."""
    weights = (num_embedding_parameters(shape) + num_head_parameters(shape)) * setting.weight_bits / 8
    return MemoryUse(weights, activations=_chunk_memory(2 * shape.hidden_size, setting))


def shared_memory(shape: HybridShape, kind: str, ffn_hidden_size: int, setting: MemoryConfig) -> MemoryUse:
    """Return the activations inside a layer of ``kind``; layers run one after another, so that of all of them the largest counts.

    Args:
        shape: its widths.
        kind: of the layer.
        ffn_hidden_size: width of the layer, where it is an MLP layer.
        setting: bits, context and batch.
    """
    if kind == MLP:
        width = ffn_hidden_size
    elif kind == MAMBA:
        width = mamba_projection_size(shape) + shape.mamba_inner_size
    else:
        width = attention_projection_size(shape) + attention_inner_size(shape)
    return MemoryUse(activations=_chunk_memory(width, setting))


def model_memory(shape: HybridShape, setting: MemoryConfig) -> MemoryUse:
    """Return what a whole model takes, under the setting's bits, context and batch."""
    total, widest_ffn = fixed_memory(shape, setting), max(shape.ffn_hidden_sizes, default=0)
    for layer, kind in enumerate(shape.layer_kinds):
        total += layer_memory(shape.of_layer(layer), kind, setting)
    shared = (shared_memory(shape, kind, widest_ffn, setting) for kind in set(shape.layer_kinds))
    return total + max(shared, key=lambda use: use.total, default=MemoryUse())


def _chunk_memory(values_per_token: int, setting: MemoryConfig) -> float:
    """Bytes of activations while a chunk of the prompt is read."""
    tokens = min(setting.prefill_chunk_tokens, setting.context_tokens) * setting.batch_size
    return tokens * values_per_token * setting.activation_bits / 8
