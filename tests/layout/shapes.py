"""Models for the tests of the arithmetic: published ones, and random ones in which no two dimensions are alike."""

from __future__ import annotations

import random

from megatron_hybrid.config.load import load_model
from megatron_hybrid.config.model import ModelConfig

PUBLISHED = ("nemotron-h-8b", "nemotron-h-56b", "nemotron-h-47b", "nemotron-h-4b", "nemotron-3-nano-4b")


def preset(name: str) -> ModelConfig:
    return load_model(name)[0]


def with_widths(model: ModelConfig, seed: int, unit: int = 1) -> ModelConfig:
    """The same with another width in every MLP layer, multiples of ``unit``."""
    draw = random.Random(seed)
    num_mlp = model.layer_kinds.count("-")
    return ModelConfig.model_validate(model.model_dump() | {"ffn_hidden_size": draw.sample(range(unit, 100 * unit, unit), num_mlp)})


def random_model(seed: int, num_layers: int = 9, tensor: int = 1) -> ModelConfig:
    """A model of random dimensions that ``tensor`` divides where it must."""
    draw = random.Random(seed)
    groups, kv_heads = draw.randint(1, 3) * tensor, draw.randint(1, 3) * tensor
    return ModelConfig(
        pattern="".join(draw.choices("M*-", k=num_layers)),
        hidden_size=draw.randint(5, 40),
        ffn_hidden_size=draw.randint(5, 90) * tensor,
        num_attention_heads=kv_heads * draw.randint(1, 3),
        num_kv_heads=kv_heads,
        head_dim=draw.randint(3, 17),
        mamba_num_heads=groups * draw.randint(1, 4),
        mamba_head_dim=draw.randint(3, 17),
        mamba_num_groups=groups,
        mamba_state_dim=draw.randint(3, 33),
        mamba_conv_width=draw.randint(2, 5),
        vocab_size=draw.randint(50, 500),
        vocab_divisible_by=16 * tensor,
    )
