"""Decoding through the caches is the uncached forward, whatever the pieces; and the loop around it chooses and stops as it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hybrid.config import RunConfig
from megatron_hybrid.generate.decode import Decoder, generate_tokens
from megatron_hybrid.generate.sampling import Sampling
from megatron_hybrid.model.build import build_chunks
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.substrate.groups import initialize
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from tests.runs import VOCAB_SIZE, small_run

BATCH_SIZE, LENGTH = 3, 37
MODELS = {
    "four taps": {},
    "two taps": {"mamba_conv_width": 2},
    "six taps": {"mamba_conv_width": 6},
    "rope": {"position_embedding": "rope"},
    "attention alone": {"pattern": "*-*-", "position_embedding": "rope"},
    "long chunks": {"mamba_chunk_size": None},
}
PIECES = {
    "token by token": [1] * LENGTH,
    "in one pass": [LENGTH],
    "prompt of one": [1, LENGTH - 1],
    "prompt shorter than the convolution, then tokens": [2] + [1] * (LENGTH - 2),
    "prompt, then tokens": [20] + [1] * (LENGTH - 20),
    "prompt of a whole chunk": [16, 1, 15, 1, 4],
    "any pieces": [3, 1, 1, 17, 2, 13],
}


def small_model(run: RunConfig) -> HybridModel:
    """A model with random weights, on this rank."""
    substrate = initialize(run)
    (model,) = build_chunks(run, build_transformer_config(run, substrate), substrate)
    return model.eval()


def run_of(folder: Path, *, precision: str = "fp32", **model: Any) -> RunConfig:
    # Weights large enough that every layer matters and logits are far from equal.
    return small_run(folder, model={"init_std": 0.15, **model}, train={"precision": precision})


def decode_in_pieces(run: RunConfig) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits of the uncached forward [B, L, V], and of cached ones after each piece [B, pieces, V]."""
    model = small_model(run)
    tokens_BL = torch.randint(VOCAB_SIZE, (BATCH_SIZE, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        uncached = model(tokens_BL).float().cpu().numpy()
    cached = {}
    for name, lengths in PIECES.items():
        decoder = Decoder(model, batch_size=BATCH_SIZE, max_length=LENGTH)
        cached[name] = np.stack([decoder.advance(piece_BL).cpu().numpy() for piece_BL in tokens_BL.split(lengths, dim=1)], axis=1)
    return uncached, cached


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_cached_decoding_is_the_uncached_forward(model: dict[str, Any], tmp_path: Path, run_ranks) -> None:
    ((uncached, cached),) = run_ranks(decode_in_pieces, 1, run_of(tmp_path, **model))
    scale = np.abs(uncached).max()
    assert scale > 1
    for name, lengths in PIECES.items():
        expected = uncached[:, np.cumsum(lengths) - 1]
        np.testing.assert_allclose(cached[name], expected, rtol=0, atol=1e-5 * scale, err_msg=name)


def test_cached_decoding_in_bf16_is_as_near_as_rounding_lets_it(tmp_path: Path, run_ranks) -> None:
    ((exact, _),) = run_ranks(decode_in_pieces, 1, run_of(tmp_path))
    ((uncached, cached),) = run_ranks(decode_in_pieces, 1, run_of(tmp_path, precision="bf16"))
    rounding = np.abs(uncached - exact).max()
    for name, lengths in PIECES.items():
        assert np.abs(cached[name] - exact[:, np.cumsum(lengths) - 1]).max() < 1.5 * rounding, name


def loop(run: RunConfig) -> dict[str, Any]:
    """What the decode loop yields under several settings, and the logits that an uncached forward has for the greedy ones."""
    model = small_model(run)
    prompt = [5, 17, 3, 200]

    def tokens(**settings: Any) -> list[int]:
        defaults = {"sampling": Sampling(), "seed": 0, "vocab_size": VOCAB_SIZE, "eod_id": -1, "max_new_tokens": 24}
        return list(generate_tokens(model, prompt, **{**defaults, **settings}))

    greedy = tokens(sampling=Sampling(temperature=0.0))
    with torch.no_grad():
        uncached = model(torch.tensor([prompt + greedy]))[0, len(prompt) - 1 : -1].cpu().numpy()
    report = {
        "greedy": greedy,
        "uncached": uncached,
        "stopped": tokens(sampling=Sampling(temperature=0.0), eod_id=greedy[6]),
        "one": tokens(sampling=Sampling(temperature=0.0), max_new_tokens=1),
        "seeds": [tokens(seed=seed) for seed in (1, 1, 2)],
        "first ten": tokens(vocab_size=10),
    }
    model.output_layer.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are not finite after 4 tokens"):
        tokens()
    return report


def test_the_loop(tmp_path: Path, run_ranks) -> None:
    (report,) = run_ranks(loop, 1, run_of(tmp_path))
    greedy = report["greedy"]
    assert greedy == report["uncached"].argmax(-1).tolist() and len(greedy) == 24
    assert len(set(greedy)) > 3, "the same token over and over proves little"
    assert report["stopped"] == greedy[: greedy.index(greedy[6]) + 1], "the end-of-document token is the last"
    assert report["one"] == greedy[:1]
    first, again, other = report["seeds"]
    assert first == again != other
    assert max(report["first ten"]) < 10
