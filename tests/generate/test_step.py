"""Prompts in pieces and then tokens one by one give what a forward pass over each whole sequence alone gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hybrid.config import RunConfig
from megatron_hybrid.generate.engine import new_cache
from megatron_hybrid.generate.prefill import run_prompts
from megatron_hybrid.generate.stages import Stages
from megatron_hybrid.generate.step import describe_position, embed, logits_of, run_layers
from megatron_hybrid.ops.decode import TORCH
from tests.generate.models import random_prompts, run_of, small_model
from tests.runs import VOCAB_SIZE

LENGTHS = (150, 131, 70, 64, 5, 2, 1)
"""Of prompts: pieces are of 64 tokens here, some prompts end with one, and some are shorter than the convolution."""
NUM_NEW = 9
MODELS = {
    "four taps": {},
    "two taps": {"mamba_conv_width": 2},
    "six taps": {"mamba_conv_width": 6},
    "rope": {"position_embedding": "rope"},
    "attention alone": {"pattern": "*-*-", "position_embedding": "rope"},
    "long chunks": {"mamba_chunk_size": None},
}


@torch.inference_mode()
def logits_both_ways(run: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """Logits after each prompt and each of the tokens behind it [B, 1 + new, V]: of whole sequences, and through the caches."""
    model, _ = small_model(run)
    prompts, news = random_prompts(*LENGTHS), random_prompts(*[NUM_NEW] * len(LENGTHS))
    whole = [model(torch.tensor([prompt + new]))[0, len(prompt) - 1 :] for prompt, new in zip(prompts, news)]

    caches = [new_cache(layer, len(prompts), max(LENGTHS) + NUM_NEW) for layer in model.decoder.layers]
    for cache in caches:
        if cache is not None:
            for tensor in vars(cache).values():
                # What an earlier sequence left there.
                tensor.normal_()
    last = torch.zeros(len(prompts), run.model.hidden_size)
    for piece in run_prompts(model, prompts, caches, stages=Stages(), max_tokens=64):
        for row, valid in enumerate(piece.num_valid):
            if valid:
                last[row] = piece.hidden_LBD[valid - 1, row].float()
    cached = [model.output_layer.logits(last[None].to(model.config.params_dtype)).squeeze(1)]
    for number in range(NUM_NEW):
        position_B = torch.tensor([len(prompt) + number for prompt in prompts])
        here = describe_position(model, position_B, torch.ones(len(prompts), dtype=torch.bool))
        hidden_BD = run_layers(model, embed(model, torch.tensor([new[number] for new in news])), caches, here, TORCH)
        cached.append(logits_of(model, hidden_BD, TORCH))
    return torch.stack(whole).float().numpy(), torch.stack(cached, dim=1).float().numpy()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_caches_give_the_logits_of_the_whole_sequence(model: dict[str, Any], tmp_path: Path, run_ranks) -> None:
    ((whole, cached),) = run_ranks(logits_both_ways, 1, run_of(tmp_path, **model))
    scale = np.abs(whole).max()
    assert scale > 1 and whole.shape == (len(LENGTHS), 1 + NUM_NEW, VOCAB_SIZE)
    np.testing.assert_allclose(cached, whole, rtol=0, atol=1e-5 * scale)


def test_in_bf16_they_are_as_near_as_rounding_lets_them(tmp_path: Path, run_ranks) -> None:
    ((exact, _),) = run_ranks(logits_both_ways, 1, run_of(tmp_path))
    ((whole, cached),) = run_ranks(logits_both_ways, 1, run_of(tmp_path, precision="bf16"))
    assert np.abs(cached - exact).max() < 1.5 * np.abs(whole - exact).max()
