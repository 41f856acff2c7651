"""Small NemotronH checkpoints as transformers itself saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from megatron_hybrid.convert.hub_config import UNCLAMPED_TIME_STEP_MIN

BASE = {
    "vocab_size": 250,
    "hidden_size": 32,
    "intermediate_size": 48,
    "hybrid_override_pattern": "M-M*M-",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "chunk_size": 16,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": None,
    "time_step_min": UNCLAMPED_TIME_STEP_MIN,
}
CONFIG = {"model_type": "nemotron_h", "layer_norm_epsilon": 1e-5, **BASE}
"""What of config.json decides the weights."""
SHAPES: dict[str, dict[str, Any]] = {
    "one group": {"n_groups": 1},
    "a group per head": {"n_groups": 8},
    "head dim 64": {"mamba_num_heads": 2, "mamba_head_dim": 64},
    "head dim 80, inner width not 2 x hidden": {"mamba_num_heads": 2, "mamba_head_dim": 80, "hidden_size": 48},
    "runs of one kind": {"hybrid_override_pattern": "M---MM*-"},
    "one KV group": {"num_key_value_heads": 1},
    "as many KV groups as heads, wide heads": {"num_key_value_heads": 4, "head_dim": 24},
    "six taps, vocabulary of whole rows": {"conv_kernel": 6, "vocab_size": 256},
}


def random_hub_model(seed: int = 0, **changes: Any) -> NemotronHForCausalLM:
    """transformers' model with weights large enough that every layer matters, all of them random: norms, D and biases too."""
    model = NemotronHForCausalLM(NemotronHConfig(**{**BASE, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                parameter.copy_(0.5 * noise)
            elif name.endswith("dt_bias"):
                parameter.copy_(noise - 3)
            elif parameter.ndim == 1 or name.endswith("conv1d.weight"):
                parameter.copy_(0.3 * noise + (0 if name.endswith("bias") else 1))
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


def save_hub(path: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a random model as transformers does."""
    random_hub_model(seed, **changes).to(dtype).save_pretrained(path)
    return path


def edit_json(file: Path, **changes: Any) -> None:
    """Change entries of a JSON object; None removes one."""
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
