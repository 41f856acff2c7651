"""A small run on a small corpus, for tests that train, and its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_hybrid.config import RunConfig
from megatron_hybrid.data.indexed import IndexedWriter
from megatron_hybrid.model.build import build_chunks
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.groups import initialize
from megatron_hybrid.substrate.transformer_config import build_transformer_config

VOCAB_SIZE = 250
EOD_ID = 0

MODEL = {
    "pattern": "M-M*M-M*",
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 12,
    "mamba_num_groups": 4,
    "mamba_state_dim": 16,
    "mamba_chunk_size": 16,
    "vocab_size": VOCAB_SIZE,
}


def write_corpus(prefix: Path, num_documents: int = 64, seed: int = 0) -> Path:
    """Write documents with something to learn: each repeats a short random motif with a little noise."""
    generator = np.random.default_rng(seed)
    with IndexedWriter(prefix, VOCAB_SIZE) as writer:
        for _ in range(num_documents):
            motif = generator.integers(1, VOCAB_SIZE, generator.integers(3, 9))
            document = np.resize(motif, generator.integers(20, 120))
            noisy = np.where(generator.random(len(document)) < 0.1, generator.integers(1, VOCAB_SIZE, len(document)), document)
            document = np.append(noisy, EOD_ID).astype(np.uint16)
            writer.add_documents(document, np.array([len(document)]))
    return prefix


def small_run(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run over ``folder / "text"`` (written by ``write_corpus``) of five steps of 8 samples of 40 tokens; sections override single
    options."""
    options: dict[str, Any] = {
        "run_dir": folder / "run",
        "model": dict(MODEL),
        "data": {"sources": {"text": folder / "text"}, "sequence_length": 40, "num_workers": 0, "reset_at_documents": True},
        "optimizer": {"lr": 3e-3},
        "schedule": {"kind": "constant"},
        "train": {"steps": 5, "global_batch_size": 8, "micro_batch_size": 1, "precision": "fp32"},
        "runtime": {"timeout_s": 60, "threads_per_rank": 1},
    }
    for name, section in sections.items():
        options[name] = {**options.get(name, {}), **section} if isinstance(section, dict) else section
    return RunConfig(**options)


def build_model(run: RunConfig) -> tuple[HybridModel, Substrate]:
    """This rank's part of the model, in one chunk, and where the rank stands; joins the ranks of the run."""
    substrate = initialize(run)
    (model,) = build_chunks(run, build_transformer_config(run, substrate), substrate)
    return model, substrate
