"""PREFIX.json: what a corpus holds, what was left out of it, and what it was made from."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_hybrid.data.indexed import CorpusError, naming_full_disk


@dataclass(frozen=True)
class CorpusReport:
    """What was prepared under a prefix. Equal inputs and options give an equal report."""

    documents: int
    tokens: int
    """Tokens of all documents, the end-of-document tokens included."""
    max_token_id: int
    """Largest id in the corpus; -1 when it is empty."""
    vocab_size: int
    """Vocabulary of the tokenizer."""
    eod_id: int
    """Token at the end of every document."""
    tokenizer: str
    """The tokenizer's fingerprint."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason -> documents left out for it."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> where the first of them stand."""
    recipe: dict[str, str | int | float] = field(default_factory=dict)
    """Everything that decides the corpus: inputs, tokenizer, options."""


def report_path(prefix: Path) -> Path:
    """Return the path of the report of the corpus at ``prefix``."""
    return prefix.with_name(prefix.name + ".json")


def load_report(prefix: Path) -> CorpusReport | None:
    """Return the report beside a corpus, or None where there is none: corpora made by other tools have none.

    Raises:
        CorpusError: there is one, but it is damaged.
    """
    path = report_path(prefix)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return CorpusReport(**content)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        names = ", ".join(item.name for item in fields(CorpusReport))
        raise CorpusError(f"{path} is no report of a corpus ({names}): {error}; build the corpus again, or remove the file") from error


def save_report(prefix: Path, report: CorpusReport) -> None:
    """Write the report beside its corpus."""
    save_json(report_path(prefix), asdict(report))


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is either whole or not there.

    Raises:
        OSError: the disk is full or not writable; names the file.
    """
    # Several ranks may write the same file at once.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    with naming_full_disk(partial):
        try:
            with open(partial, "w", encoding="utf-8") as stream:
                json.dump(content, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            partial.unlink(missing_ok=True)
            raise
    os.replace(partial, path)
