"""Which of our tensors is which of Hugging Face's NemotronH: names, shapes and arrangement. Arithmetic on a configuration, without tensors.

Our keys are those of a torch_dist checkpoint (docs/formats.md), which Megatron-LM shares. Hugging Face's names are transformers', under
``model.``; the hub's, under ``backbone.``, differ in that prefix alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.layout.pattern import ATTENTION, MAMBA
from megatron_hybrid.layout.shape import attention_inner_size, attention_projection_size, mamba_conv_channels, mamba_projection_size

HUB_HEAD = "lm_head.weight"
"""The one name in a Hugging Face checkpoint that has no prefix."""


@dataclass(frozen=True)
class NativeTensor:
    """A tensor of ours, whole."""

    key: str
    shape: tuple[int, ...]
    axis: int | None
    """The dimension that tensor parallelism cuts; None for a tensor that every rank holds whole."""


@dataclass(frozen=True)
class HubTensor:
    """A tensor of Hugging Face's."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Correspondence:
    """The smallest set of tensors that holds the same numbers on both sides, and so the unit that a conversion streams."""

    native: tuple[NativeTensor, ...]
    hub: tuple[HubTensor, ...]
    arrangement: Literal["same", "rows", "qkv", "vocabulary"]
    """same: one tensor, unchanged. rows: ours, one after another along dimension 0, are theirs. qkv: theirs are all queries, keys and
    values; ours has them by KV group. vocabulary: ours has padding rows after theirs."""
    layer: int | None
    """Number in the whole model; None outside the layers."""
    is_fp32: bool = False
    """Kept in fp32 whatever the checkpoint's dtype: A_log, D and dt_bias."""

    @property
    def parameter(self) -> str:
        """Global name of the module parameter that holds the native tensors, one after another along dimension 0."""
        key = self.native[0].key
        return key.rpartition(".")[0] if self.arrangement == "rows" else key


def correspondences(model: ModelConfig) -> tuple[Correspondence, ...]:
    """Return all tensors of a model, in model order: the embedding, the layers by number, the final norm, the output layer."""
    layers = {MAMBA: _mamba_layer, ATTENTION: _attention_layer}
    found = [_vocabulary("embedding.word_embeddings.weight", "model.embeddings.weight", model)]
    for number, kind in enumerate(model.layer_kinds):
        found += layers.get(kind, _mlp_layer)(model.of_layer(number), number)
    found.append(_same("decoder.final_norm.weight", "model.norm_f.weight", (model.hidden_size,), None))
    found.append(_vocabulary("output_layer.weight", HUB_HEAD, model))
    return tuple(found)


def _mamba_layer(model: ModelConfig, layer: int) -> Iterator[Correspondence]:
    ours, theirs = f"decoder.layers.{layer}.mixer.", f"model.layers.{layer}.mixer."
    hidden, inner, heads = model.hidden_size, model.mamba_inner_size, model.mamba_num_heads
    group_states = model.mamba_num_groups * model.mamba_state_dim
    conv_parts = (("x", inner), ("B", group_states), ("C", group_states))
    yield _norm(layer, f"{ours}in_proj.", hidden)
    yield _rows(
        layer,
        f"{ours}in_proj.weight",
        f"{theirs}in_proj.weight",
        (("z", inner), *conv_parts, ("dt", heads)),
        (mamba_projection_size(model), hidden),
    )
    channels = mamba_conv_channels(model)
    yield _rows(layer, f"{ours}conv1d.weight", f"{theirs}conv1d.weight", conv_parts, (channels, 1, model.mamba_conv_width))
    yield _rows(layer, f"{ours}conv1d.bias", f"{theirs}conv1d.bias", conv_parts, (channels,))
    for name in ("A_log", "D", "dt_bias"):
        yield _same(ours + name, theirs + name, (heads,), layer, axis=0, is_fp32=True)
    yield _same(f"{ours}norm.weight", f"{theirs}norm.weight", (inner,), layer, axis=0)
    yield _same(f"{ours}out_proj.weight", f"{theirs}out_proj.weight", (hidden, inner), layer, axis=1)


def _attention_layer(model: ModelConfig, layer: int) -> Iterator[Correspondence]:
    ours, theirs = f"decoder.layers.{layer}.self_attention.", f"model.layers.{layer}.mixer."
    hidden, width, kv_width = model.hidden_size, attention_inner_size(model), model.num_kv_heads * model.head_dim
    yield _norm(layer, f"{ours}linear_qkv.", hidden)
    yield Correspondence(
        (NativeTensor(f"{ours}linear_qkv.weight", (attention_projection_size(model), hidden), 0),),
        tuple(
            HubTensor(f"{theirs}{letter}_proj.weight", (rows, hidden)) for letter, rows in (("q", width), ("k", kv_width), ("v", kv_width))
        ),
        "qkv",
        layer,
    )
    yield _same(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight", (hidden, width), layer, axis=1)


def _mlp_layer(model: ModelConfig, layer: int) -> Iterator[Correspondence]:
    ours, theirs = f"decoder.layers.{layer}.mlp.", f"model.layers.{layer}.mixer."
    hidden, inner = model.hidden_size, model.ffn_hidden_size
    yield _norm(layer, f"{ours}linear_fc1.", hidden)
    yield _same(f"{ours}linear_fc1.weight", f"{theirs}up_proj.weight", (inner, hidden), layer, axis=0)
    yield _same(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight", (hidden, inner), layer, axis=1)


def _norm(layer: int, linear: str, hidden: int) -> Correspondence:
    """The layer's norm, which our checkpoints keep beside the linear that it feeds."""
    return _same(f"{linear}layer_norm_weight", f"model.layers.{layer}.norm.weight", (hidden,), layer)


def _same(
    key: str, name: str, shape: tuple[int, ...], layer: int | None, *, axis: int | None = None, is_fp32: bool = False
) -> Correspondence:
    return Correspondence((NativeTensor(key, shape, axis),), (HubTensor(name, shape),), "same", layer, is_fp32)


def _rows(layer: int, key: str, name: str, parts: tuple[tuple[str, int], ...], shape: tuple[int, ...]) -> Correspondence:
    native = tuple(NativeTensor(f"{key}.{part}", (rows, *shape[1:]), 0) for part, rows in parts)
    return Correspondence(native, (HubTensor(name, shape),), "rows", layer)


def _vocabulary(key: str, name: str, model: ModelConfig) -> Correspondence:
    ours, theirs = (model.padded_vocab_size, model.hidden_size), (model.vocab_size, model.hidden_size)
    return Correspondence((NativeTensor(key, ours, 0),), (HubTensor(name, theirs),), "vocabulary", None)
