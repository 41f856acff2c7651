"""A CLIP with both halves, small and random."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "projection_dim": 24}


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights in a folder, its tokenizer one of single letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz.-"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=64)
    tokenizer.save_pretrained(folder)
    text = SMALL | {"vocab_size": len(tokens), "max_position_embeddings": 64, "eos_token_id": len(tokens) - 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=SMALL | {"image_size": 32, "patch_size": 16}, projection_dim=24)
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder
