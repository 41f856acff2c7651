"""Small models with random weights on this rank, and a tokenizer whose words are t1, t2..."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch

from megatron_hybrid.config import RunConfig
from megatron_hybrid.data.tokenizer import HuggingFaceTokenizer
from megatron_hybrid.generate.engine import Engine, Start
from megatron_hybrid.generate.load import load_language_model
from megatron_hybrid.generate.sampling import Sampling
from megatron_hybrid.generate.stages import Stages
from megatron_hybrid.model.build import build_chunks
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.groups import initialize
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from tests.runs import EOD_ID, VOCAB_SIZE, small_run


def run_of(folder: Path, *, precision: str = "fp32", parallel: dict[str, int] | None = None, **model: Any) -> RunConfig:
    # Weights large enough that every layer matters and logits are far from equal.
    return small_run(folder, model={"init_std": 0.15, **model}, train={"precision": precision}, parallel=parallel or {})


def small_model(run: RunConfig) -> tuple[HybridModel, Substrate]:
    """This rank's stage of a model with random weights, the same in every layout."""
    substrate = initialize(run)
    (model,) = build_chunks(run, build_transformer_config(run, substrate), substrate)
    return model.eval(), substrate


def random_prompts(*lengths: int) -> list[list[int]]:
    """Prompts of these lengths; none has the end-of-document token."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(EOD_ID + 1, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def generate(engine: Engine, starts: Sequence[Start], num_new: int, first: int = 0) -> list[list[int]]:
    """The new tokens of sequences that start together in slots ``first`` and following, all else being free."""
    tokens = [engine.prefill(first, starts)]
    tokens += [engine.step().fetch()[first : first + len(starts)] for _ in range(num_new - 1)]
    for slot in range(first, first + len(starts)):
        engine.release(slot)
    return [list(row) for row in zip(*tokens, strict=True)]


def word_tokenizer() -> tokenizers.Tokenizer:
    """t1, t2... by whitespace; token 0 ends a document."""
    vocabulary = {"<|endoftext|>": EOD_ID} | {f"t{token}": token for token in range(1, VOCAB_SIZE)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t1"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tokenizer


def as_ours(tokenizer: tokenizers.Tokenizer) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(tokenizer.to_str())


def continue_in_shards(run: RunConfig, path: Path, prompts: list[list[int]], num_new: int) -> dict[str, object]:
    """What a directory's model makes of prompts in the run's layout, and how it is spoken to; runs on every rank."""
    substrate = initialize(run)
    language_model = load_language_model(run, path, substrate)
    engine = Engine(language_model.model, max_batch_size=3, max_length=120, vocab_size=VOCAB_SIZE, stages=Stages.of(substrate))
    tokens = generate(engine, [Start(prompt, Sampling(temperature=0.0), 0) for prompt in prompts], num_new)
    return {"tokens": tokens, "companions": language_model.companions, "precision": run.train.precision}
