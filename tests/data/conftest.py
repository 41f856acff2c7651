"""Small tokenizers and corpora for the data tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from megatron_hybrid.config.schema import RunConfig
from megatron_hybrid.data.indexed import IndexedWriter
from megatron_hybrid.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_hybrid.data.tokenizer_training import train_sentencepiece

CODE = Path(json.__file__).parent


@pytest.fixture(scope="session")
def code_files() -> list[Path]:
    """Python source files of the running interpreter."""
    return sorted([*CODE.glob("*.py"), *(CODE.parent / "email").glob("*.py"), *(CODE.parent / "asyncio").glob("*.py")])


@pytest.fixture(scope="session")
def model_proto(code_files: list[Path]) -> bytes:
    """A sentencepiece model of 800 entries trained on those files."""
    return train_sentencepiece((path.read_text("utf-8") for path in code_files), 800)


@pytest.fixture(scope="session")
def tokenizer(model_proto: bytes) -> SentencePieceTokenizer:
    """The tokenizer of that model."""
    return SentencePieceTokenizer(model_proto)


@pytest.fixture(scope="session")
def huggingface_definition(code_files: list[Path]) -> str:
    """The tokenizer.json of a byte-level BPE tokenizer trained on the same files."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator((path.read_text("utf-8") for path in code_files), trainer)
    trained.enable_truncation(4)
    return trained.to_str()


@pytest.fixture(scope="session")
def huggingface_tokenizer(huggingface_definition: str) -> HuggingFaceTokenizer:
    """The tokenizer of that definition."""
    return HuggingFaceTokenizer(huggingface_definition)


@pytest.fixture
def write_corpus() -> Callable[..., Path]:
    """Return a function (prefix, documents, vocab_size) that writes an indexed corpus and returns the prefix."""

    def write(prefix: Path, documents: Sequence[Sequence[int]], vocab_size: int = 1000) -> Path:
        with IndexedWriter(prefix, vocab_size) as writer:
            for document in documents:
                writer.add_documents(np.array(document, dtype=np.int64), np.array([len(document)]))
        return prefix

    return write


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    """Return a function (data, validation, seed, steps, vocab_size) that makes a small run's configuration."""

    def make(
        data: dict[str, object], validation: dict[str, Path] | None = None, seed: int = 1234, steps: int = 100, vocab_size: int = 1000
    ) -> RunConfig:
        model = {"pattern": "M*-", "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2, "num_kv_heads": 2, "head_dim": 16}
        mamba = {"mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_num_groups": 2, "mamba_state_dim": 8}
        return RunConfig.model_validate(
            {
                "run_dir": "run",
                "seed": seed,
                "model": {**model, **mamba, "vocab_size": vocab_size},
                "data": {"sequence_length": 16, **data},
                "optimizer": {"lr": 1e-3},
                "train": {"steps": steps, "global_batch_size": 4},
                "validation": {"sources": validation or {}},
            }
        )

    return make
