"""What the arithmetic needs to know of a model and of a layout; `config` has the types that fit."""

from __future__ import annotations

from typing import Protocol, Self


class HybridShape(Protocol):
    """The dimensions of a hybrid model, named as in ``ModelConfig``."""

    @property
    def pattern(self) -> str: ...
    @property
    def layer_kinds(self) -> str: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def ffn_hidden_size(self) -> int | tuple[int, ...]: ...
    @property
    def ffn_hidden_sizes(self) -> tuple[int, ...]: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def mamba_num_heads(self) -> int: ...
    @property
    def mamba_num_groups(self) -> int: ...
    @property
    def mamba_state_dim(self) -> int: ...
    @property
    def mamba_conv_width(self) -> int: ...
    @property
    def mamba_inner_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def padded_vocab_size(self) -> int: ...
    def of_layer(self, layer: int) -> Self: ...


class PipelineShape(Protocol):
    """How many stages there are and, where the user says so, how many layers each holds; named as in ``ParallelConfig``."""

    @property
    def pipeline(self) -> int: ...
    @property
    def virtual_pipeline(self) -> int: ...
    @property
    def stages(self) -> tuple[int, ...] | None: ...


def mamba_projection_size(shape: HybridShape) -> int:
    """Return the output width of the Mamba-2 input projection: z, x, B, C and dt."""
    return shape.mamba_inner_size + mamba_conv_channels(shape) + shape.mamba_num_heads


def mamba_conv_channels(shape: HybridShape) -> int:
    """Return the channels of the causal convolution: x, B and C."""
    return shape.mamba_inner_size + 2 * shape.mamba_num_groups * shape.mamba_state_dim


def attention_projection_size(shape: HybridShape) -> int:
    """Return the output width of the attention input projection: queries, keys and values."""
    return (shape.num_attention_heads + 2 * shape.num_kv_heads) * shape.head_dim


def attention_inner_size(shape: HybridShape) -> int:
    """Return the width of all query heads together, which need not be the hidden size."""
    return shape.num_attention_heads * shape.head_dim
