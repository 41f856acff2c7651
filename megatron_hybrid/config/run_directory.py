"""Where things are in a run directory."""

from __future__ import annotations

from pathlib import Path

from megatron_hybrid.config.schema import RunConfig, TokenizerConfig

CONFIG_NAME = "config.yaml"
"""The resolved run, as its newest start had it."""
CHECKPOINTS_NAME = "checkpoints"
TOKENIZER_FOLDER = "tokenizer"
"""The tokenizer of a converted checkpoint, with what lies beside it."""
STARTS_NAME = "starts.jsonl"
"""One line per start: when, where, with which code and options."""


def tokenizer_copy(tokenizer: TokenizerConfig, run_dir: Path) -> Path:
    """Where a run keeps its copy of the tokenizer."""
    return run_dir / ("tokenizer" + tokenizer.path.suffix)


def kept_tokenizer(run: RunConfig, run_dir: Path) -> TokenizerConfig | None:
    """The run's tokenizer, by the copy in its directory where there is one: the directory may have moved, and the original changed."""
    tokenizer = run.data.tokenizer
    if tokenizer is None:
        return None
    copies = (tokenizer_copy(tokenizer, run_dir), run_dir / TOKENIZER_FOLDER / tokenizer.path.name)
    return next((tokenizer.model_copy(update={"path": copy}) for copy in copies if copy.exists()), tokenizer)
