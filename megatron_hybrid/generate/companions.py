"""How a model is spoken to, as what lies beside its weights says: what comes before a prompt, what ends a text, how a chat is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.run_directory import kept_tokenizer
from megatron_hybrid.convert.companions import GENERATION_CONFIG, ids_of, prompt_start_of, read_json
from megatron_hybrid.data.tokenizer import Tokenizer

_SETTINGS, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_CONFIG = "config.json"


@dataclass(frozen=True)
class Companions:
    """How a model is spoken to."""

    prompt_prefix: tuple[int, ...]
    """Tokens that come before a document's own first."""
    end_tokens: frozenset[int]
    """Tokens after which there is nothing more; the tokenizer's end-of-document token is one."""
    chat_template: str | None
    """Jinja text that writes a chat as one prompt, as Hugging Face keeps it; None where the model has none."""
    special_tokens: Mapping[str, str]
    """bos_token, eos_token and so on, by which a chat template names them."""


def native_companions(run: RunConfig, run_dir: Path, tokenizer: Tokenizer, header: Mapping[str, Any]) -> Companions:
    """Those of a run of ours; a chat template and further end tokens lie beside the tokenizer, that which the run keeps or that which it
    was configured with.

    With ``data.reset_at_documents`` training began a document from an empty state, which is what new caches hold, with its own first token,
    and nothing ever came after an end-of-document token. Without, a document came after that token of the one before, so it comes first
    here too. A converted checkpoint says in its header how its source began, and which end tokens that had.

    Args:
        run: as it was configured.
        run_dir: where it lies by now.
        tokenizer: the run's.
        header: the checkpoint's.
    """
    template, special_tokens = None, {}
    stated = header.get("companions", {"token_ids": {}, "prompt_start": prompt_start_of(run)})
    end_tokens = {tokenizer.eod_id} | _end_tokens(stated["token_ids"])
    for options in (kept_tokenizer(run, run_dir), run.data.tokenizer):
        folder = options.path if options.path.is_dir() else options.path.parent
        end_tokens |= _end_tokens(_read_json(folder / GENERATION_CONFIG))
        if template is None:
            template, special_tokens = _read_chat(folder)
    prefix = {"tokenizer": tokenizer.prefix, "end_of_document": (tokenizer.eod_id,), "nothing": ()}[stated["prompt_start"]]
    return Companions(prefix, frozenset(end_tokens), template, special_tokens)


def hub_companions(path: Path, tokenizer: Tokenizer) -> Companions:
    """Those of a Hugging Face directory."""
    template, special_tokens = _read_chat(path)
    end_tokens = {tokenizer.eod_id}
    for name in (_CONFIG, GENERATION_CONFIG):
        end_tokens |= _end_tokens(_read_json(path / name))
    return Companions(tokenizer.prefix, frozenset(end_tokens), template, special_tokens)


def _end_tokens(fields: Mapping[str, Any]) -> set[int]:
    return set(ids_of(fields.get("eos_token_id")))


def _read_chat(folder: Path) -> tuple[str | None, dict[str, str]]:
    settings = _read_json(folder / _SETTINGS)
    special_tokens = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in settings.items()
        if name.endswith("_token") and isinstance(value, (str, dict))
    }
    if (folder / _TEMPLATE).is_file():
        return (folder / _TEMPLATE).read_text(encoding="utf-8"), special_tokens
    template = settings.get("chat_template")
    if isinstance(template, Sequence) and not isinstance(template, str):
        # Several, by name.
        template = next((each["template"] for each in template if each.get("name") == "default"), None)
    return template, special_tokens


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a file, empty where there is none.

    Raises:
        ValueError: the file is no JSON object.
    """
    return read_json(file) if file.is_file() else {}
