"""What goes with the weights: the tokenizer's files, the ids of special tokens, and how a prompt begins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_hybrid.config import RunConfig, TokenizerConfig
from megatron_hybrid.data.tokenizer import load_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
"""Names of what goes with the weights unchanged."""
GENERATION_CONFIG = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What config.json and generation_config.json say of special tokens: an id, a list of them, or null."""
_DEFINITIONS = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}

PromptStart = Literal["tokenizer", "end_of_document", "nothing"]
"""What comes before a prompt: the tokens that the tokenizer's own rules put there, as Hugging Face has it; the end-of-document token of
the document before; nothing."""


@dataclass(frozen=True)
class Companions:
    """What a checkpoint has beside its weights."""

    tokenizer_files: Mapping[str, Path] = field(default_factory=dict)
    """Name in a target -> file."""
    tokenizer: TokenizerConfig | None = None
    """How to read them; None when there are none."""
    token_ids: Mapping[str, Any] = field(default_factory=dict)
    """Those of ``TOKEN_IDS`` that are known, as config.json has them."""
    prompt_start: PromptStart = "end_of_document"
    sequence_length: int = 8192
    """Longest sequence in training, as far as it is known."""
    step: int = 0
    """Optimizer steps behind the weights; 0 when unknown."""

    def stated(self) -> dict[str, Any]:
        """Return, as plain JSON, what no file has: checkpoints that are no Hugging Face directories keep it in their header."""
        return {"token_ids": dict(self.token_ids), "prompt_start": self.prompt_start}


def prompt_start_of(run: RunConfig) -> PromptStart:
    """Return how a run of ours began its documents, and so how prompts to its model begin.

    With ``data.reset_at_documents`` a document began from an empty state with its own first token. Without, it came after the
    end-of-document token of the one before.
    """
    return "nothing" if run.data.reset_at_documents else "end_of_document"


def tokenizer_in(folder: Path) -> tuple[TokenizerConfig | None, dict[str, Path]]:
    """Return how to read the tokenizer in a folder, None when there is none, and the files that go with the weights."""
    tokenizer = _find_tokenizer(folder)
    return tokenizer, files_in(folder) if tokenizer is None else files_of(tokenizer)


def _find_tokenizer(folder: Path) -> TokenizerConfig | None:
    if (folder / "tokenizer.json").is_file():
        return TokenizerConfig(kind="huggingface", path=folder / "tokenizer.json")
    if models := sorted(folder.glob("*.model")):
        return TokenizerConfig(kind="sentencepiece", path=models[0])
    return None


def files_in(folder: Path) -> dict[str, Path]:
    """Return those of ``TOKENIZER_FILES`` that a folder has."""
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}


def files_of(tokenizer: TokenizerConfig) -> dict[str, Path]:
    """Return what belongs to a tokenizer, itself included: what its folder has, or what lies beside its file."""
    path = tokenizer.path
    if path.is_dir():
        return files_in(path) | {file.name: file for file in sorted(path.glob("*.model"))}
    own = _DEFINITIONS[tokenizer.kind]
    # Beside a tokenizer.json, a tokenizer.model is what it was made from. Any other pair of definitions are two tokenizers.
    others = set(_DEFINITIONS.values()) - ({"tokenizer.model"} if path.name == "tokenizer.json" else set())
    return {own: path} | {name: file for name, file in files_in(path.parent).items() if name not in others | {own}}


def with_tokenizer(companions: Companions, tokenizer: TokenizerConfig) -> Companions:
    """Return the same with another tokenizer, and the special tokens that its generation_config.json and itself name.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        eod_id = load_tokenizer(tokenizer.kind, tokenizer.path, tokenizer.eod_token).eod_id
    except ValueError as error:
        raise ValueError(f"{error}; name with --tokenizer the one that goes with the weights") from error
    files = files_of(tokenizer)
    token_ids = {"eos_token_id": eod_id}
    if GENERATION_CONFIG in files:
        token_ids |= read_token_ids(read_json(files[GENERATION_CONFIG]), GENERATION_CONFIG)
    return replace(companions, tokenizer=tokenizer, tokenizer_files=files, token_ids=token_ids)


def copy_tokenizer(companions: Companions, folder: Path, final_folder: Path) -> TokenizerConfig | None:
    """Copy the tokenizer's files, and return how to read them when the target has its final name."""
    if companions.tokenizer_files:
        folder.mkdir(exist_ok=True)
    for name, file in companions.tokenizer_files.items():
        shutil.copyfile(file, folder / name)
    tokenizer = companions.tokenizer
    if tokenizer is None:
        return None
    final = final_folder if tokenizer.path.is_dir() else final_folder / _DEFINITIONS[tokenizer.kind]
    return tokenizer.model_copy(update={"path": final})


def read_token_ids(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the special tokens that a configuration names.

    Raises:
        ValueError: one is neither an id, a list of ids nor null; ``name`` is the file's in the message.
    """
    found = {key: fields[key] for key in TOKEN_IDS if key in fields}
    for key, value in found.items():
        if not all(type(each) is int for each in ids_of(value)):
            raise ValueError(f"{name} has {key}={value!r}; expected a token's id, a list of ids or null")
    return found


def ids_of(value: Any) -> list[Any]:
    """Return as a list what a configuration has as an id, a list of ids or null."""
    return value if isinstance(value, list) else [] if value is None else [value]


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: the file is no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no JSON object")
    return content


def companion_differences(source: Companions, target: Companions) -> list[str]:
    """Return what of the source's companions the target does not have, or has otherwise: files byte by byte, and special tokens that the
    source knows."""
    found = []
    for name, file in source.tokenizer_files.items():
        copy = target.tokenizer_files.get(name)
        if copy is None:
            found.append(f"{name}: not there, though the source has it")
        elif copy.read_bytes() != file.read_bytes():
            found.append(f"{name}: other contents")
    for key in TOKEN_IDS:
        here, there = source.token_ids.get(key), target.token_ids.get(key)
        if here not in (None, there):
            found.append(f"{key}: {there!r}, in the source {here!r}")
    return found
