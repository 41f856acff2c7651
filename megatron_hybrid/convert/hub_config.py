"""A Hugging Face ``config.json`` of NemotronH, read into our model configuration and written from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ValidationError

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.convert.companions import TOKEN_IDS
from megatron_hybrid.convert.widen import require_one_width
from megatron_hybrid.layout.pattern import ATTENTION, LAYER_KINDS, MAMBA, MLP

HubStyle = Literal["transformers", "hub"]
"""transformers: names under ``model.`` and ``layers_block_type``, as its own class saves. hub: names under ``backbone.`` and
``hybrid_override_pattern``, as the published checkpoints have."""

UNCLAMPED_TIME_STEP_MIN = 1e-30
"""transformers clamps the time steps of a whole sequence (but not those of a single token) at ``time_step_min`` from below, where
training and the published code clamp nothing. It also takes the logarithm of it, so it cannot be zero; this is far below what fp32
weights notice."""

_BLOCK_TYPES = {"linear_attention": MAMBA, "mamba": MAMBA, "full_attention": ATTENTION, "attention": ATTENTION, "mlp": MLP}
_BLOCK_NAMES = {MAMBA: "linear_attention", ATTENTION: "full_attention", MLP: "mlp"}
_FIELDS = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_num_groups": "n_groups",
    "mamba_state_dim": "ssm_state_size",
    "mamba_conv_width": "conv_kernel",
    "vocab_size": "vocab_size",
}
_FIXED = {
    "tie_word_embeddings": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "use_conv_bias": True,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "residual_in_fp32": False,
    "sliding_window": None,
    "num_nextn_predict_layers": 0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
"""What every model of ours is, and therefore the only value that can be read."""


def model_from_hub(config: Mapping[str, Any], *, vocab_divisible_by: int = 128) -> ModelConfig:
    """Return the model that a NemotronH ``config.json`` describes.

    Args:
        config: the file's contents, with ``hybrid_override_pattern`` or ``layers_block_type``.
        vocab_divisible_by: padding unit of our embedding.

    Raises:
        ValueError: it is of another architecture, something is missing, or it asks for what our layers do not do; names the key.
    """
    if config.get("model_type") != "nemotron_h":
        raise ValueError(
            f"config.json has model_type {config.get('model_type')!r}, expected 'nemotron_h'; other architectures are not converted"
        )
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f"config.json has {key}={config[key]!r}; only {value!r} can be converted")
    _check_time_step_limit(config.get("time_step_limit"))
    fields = {ours: _required(config, theirs) for ours, theirs in _FIELDS.items()}
    fields["head_dim"] = _required(config, "head_dim", "attention_head_dim")
    fields["norm_eps"] = _required(config, "layer_norm_epsilon", "norm_eps")
    try:
        return ModelConfig(
            pattern=read_pattern(config),
            init_std=config.get("initializer_range", 0.02),
            vocab_divisible_by=vocab_divisible_by,
            **fields,
        )
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise ValueError(f"config.json does not describe a model of ours: {problems}") from None


def read_pattern(config: Mapping[str, Any]) -> str:
    """Return the layer pattern, from either way of writing it.

    Raises:
        ValueError: there is none, the two ways or the number of layers contradict each other, or a layer kind is unknown.
    """
    blocks, pattern = config.get("layers_block_type", config.get("layer_types")), config.get("hybrid_override_pattern")
    if blocks is None and pattern is None:
        raise ValueError("config.json has neither hybrid_override_pattern nor layers_block_type; one of them has to name the layers")
    if not isinstance(pattern, str | None):
        raise ValueError(f"config.json has hybrid_override_pattern={pattern!r}; expected a text of M, * and -")
    if blocks is not None and not (isinstance(blocks, list) and all(isinstance(block, str) for block in blocks)):
        raise ValueError(f"config.json has layers_block_type={blocks!r}; expected a list of {sorted(_BLOCK_TYPES)}")
    if pattern is not None:
        for position, character in enumerate(pattern, start=1):
            if character not in LAYER_KINDS:
                reason = "a stage mark of Megatron's, which is no layer; remove it" if character in "|/" else "expected M, * or -"
                raise ValueError(f"hybrid_override_pattern has {character!r} at position {position} of {len(pattern)}: {reason}")
    if blocks is not None:
        unknown = sorted(set(blocks) - _BLOCK_TYPES.keys())
        if unknown:
            raise ValueError(f"layers_block_type has {unknown}; expected {sorted(_BLOCK_TYPES)}")
        from_blocks = "".join(_BLOCK_TYPES[block] for block in blocks)
        if pattern not in (None, from_blocks):
            raise ValueError(f"config.json contradicts itself: hybrid_override_pattern is {pattern}, layers_block_type is {from_blocks}")
        pattern = from_blocks
    num_layers = config.get("num_hidden_layers", len(pattern))
    if num_layers != len(pattern):
        raise ValueError(
            f"config.json contradicts itself: num_hidden_layers={num_layers}, but the pattern has {len(pattern)} layers ({pattern})"
        )
    return pattern


def hub_from_model(
    model: ModelConfig, *, style: HubStyle, dtype: str, max_position_embeddings: int, token_ids: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the ``config.json`` of a model.

    Args:
        model: ours.
        style: how the layers are named.
        dtype: torch's name of the weights' dtype.
        max_position_embeddings: the longest sequence in training; there is no position embedding, so nothing breaks beyond it.
        token_ids: bos_token_id, eos_token_id and pad_token_id, as far as they are known.

    Raises:
        ValueError: the model has what NemotronH does not.
    """
    if model.position_embedding != "none":
        raise ValueError(
            f"model.position_embedding={model.position_embedding} cannot be written for Hugging Face: NemotronH has no position embedding"
        )
    require_one_width(model, "Hugging Face's NemotronH")
    kinds = model.layer_kinds
    layers = (
        {"hybrid_override_pattern": kinds, "num_hidden_layers": len(kinds), "attention_head_dim": model.head_dim}
        if style == "hub"
        else {"layers_block_type": [_BLOCK_NAMES[kind] for kind in kinds]}
    )
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        **layers,
        **{theirs: getattr(model, ours) for ours, theirs in _FIELDS.items()},
        "head_dim": model.head_dim,
        **_FIXED,
        # Only the published code reads it, for the inner width, and only to multiply it away again.
        "expand": max(1, model.mamba_inner_size // model.hidden_size),
        "chunk_size": model.mamba_chunk_size or 128,
        "layer_norm_epsilon": model.norm_eps,
        "initializer_range": model.init_std,
        "time_step_min": UNCLAMPED_TIME_STEP_MIN,
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        "max_position_embeddings": max_position_embeddings,
        **{key: token_ids.get(key) for key in TOKEN_IDS},
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _required(config: Mapping[str, Any], *keys: str) -> Any:
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    raise ValueError(f"config.json does not have {' or '.join(keys)}; add it")


def _check_time_step_limit(limit: Any) -> None:
    """No clamp is what is trained; infinity is written as a string, as JSON's extension, or in transformers' own way."""
    if limit is None:
        return
    try:
        bounds = [float(value["__float__"] if isinstance(value, dict) else value) for value in limit]
    except (TypeError, ValueError, KeyError):
        bounds = []
    if bounds != [0.0, float("inf")]:
        raise ValueError(f"config.json has time_step_limit={limit}; only [0, Infinity], no limit, can be converted")
