"""config.json: either spelling is read, both are written, and what our layers do not do is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import NemotronHConfig

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.convert.hub_config import hub_from_model, model_from_hub
from tests.convert.checkpoints import BASE, CONFIG, SHAPES


def without(*keys: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**CONFIG, **changes}.items() if key not in keys}


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        without("hybrid_override_pattern", layers_block_type=["mamba", "mlp", "mamba", "attention", "mamba", "mlp"]),
        without(
            "hybrid_override_pattern",
            layers_block_type=["linear_attention", "mlp", "linear_attention", "full_attention", "linear_attention", "mlp"],
        ),
        without("head_dim", attention_head_dim=8),
        {**CONFIG, "num_hidden_layers": 6, "time_step_limit": [0.0, {"__float__": "Infinity"}]},
        {**CONFIG, "time_step_limit": [0.0, float("inf")]},
        NemotronHConfig(**BASE).to_dict(),
    ],
    ids=["hub", "blocks, former names", "blocks", "attention_head_dim", "transformers' infinity", "JSON's infinity", "transformers' own"],
)
def test_every_spelling_is_the_same_model(config: dict[str, Any]) -> None:
    assert model_from_hub(config) == model_from_hub(CONFIG)
    assert model_from_hub(config).pattern == "M-M*M-"


@pytest.mark.parametrize("style", ["hub", "transformers"])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_written_configurations_are_read_back_by_us_and_by_transformers(style: Any, changes: dict[str, Any]) -> None:
    model = model_from_hub({**CONFIG, **changes})
    written = hub_from_model(model, style=style, dtype="bfloat16", max_position_embeddings=64, token_ids={"eos_token_id": 3})
    assert model_from_hub(written) == model
    assert model_from_hub(NemotronHConfig(**written).to_dict()) == model


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**CONFIG, "model_type": "llama"}, "model_type 'llama', expected 'nemotron_h'"),
        ({**CONFIG, "hybrid_override_pattern": "M-|M*M-"}, r"hybrid_override_pattern has '\|' at position 3 of 7: a stage mark"),
        ({**CONFIG, "hybrid_override_pattern": "M-E*M-"}, "has 'E' at position 3"),
        (without("hybrid_override_pattern", layers_block_type=["mamba", "moe"]), r"layers_block_type has \['moe'\]"),
        (without("hybrid_override_pattern"), "neither hybrid_override_pattern nor layers_block_type"),
        ({**CONFIG, "layers_block_type": ["mamba"]}, "contradicts itself: hybrid_override_pattern is M-M"),
        ({**CONFIG, "num_hidden_layers": 7}, "num_hidden_layers=7, but the pattern has 6"),
        (without("ssm_state_size"), "does not have ssm_state_size"),
        ({**CONFIG, "tie_word_embeddings": True}, "tie_word_embeddings=True; only False"),
        ({**CONFIG, "mlp_hidden_act": "silu"}, "mlp_hidden_act='silu'"),
        ({**CONFIG, "use_conv_bias": False}, "use_conv_bias=False"),
        ({**CONFIG, "time_step_limit": [0.001, 0.1]}, r"time_step_limit=\[0.001, 0.1\]"),
        ({**CONFIG, "time_step_limit": 5}, "time_step_limit=5; only"),
        ({**CONFIG, "time_step_limit": [0.0, None]}, r"time_step_limit=\[0.0, None\]; only"),
        ({**CONFIG, "hybrid_override_pattern": 5}, "hybrid_override_pattern=5; expected a text"),
        (without("hybrid_override_pattern", layers_block_type="mamba"), "layers_block_type='mamba'; expected a list"),
        ({**CONFIG, "n_groups": 3}, "mamba_num_groups=3"),
    ],
)
def test_what_cannot_be_converted_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_from_hub(config)


def test_a_model_with_positions_is_not_written() -> None:
    model: ModelConfig = model_from_hub(CONFIG).model_copy(update={"position_embedding": "rope"})
    with pytest.raises(ValueError, match="position_embedding=rope cannot be written"):
        hub_from_model(model, style="hub", dtype="float32", max_position_embeddings=64, token_ids={})
