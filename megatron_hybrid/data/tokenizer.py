"""Tokenizers: sentencepiece models and Hugging Face tokenizers behind one small protocol.

Both are built from their serialised form, so that a process pool receives them by pickling and needs neither the file nor transformers.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import sentencepiece
import tokenizers

from megatron_hybrid.data.word_cuts import word_pattern

EOD_TOKENS = ("<|eod|>", "<eod>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>")
"""Names looked for, in this order, where a tokenizer does not say which token ends a document."""

_CACHED_WORDS = 1 << 18
_CACHED_WORD_LENGTH = 64
_REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """Text to token ids and back. Nothing in a text is ever read as a control token, and no token is added."""

    vocab_size: int
    """Ids lie in 0 to vocab_size - 1."""
    eod_id: int
    """The token that ends a document."""
    fingerprint: str
    """A hash of everything that decides the ids of a text."""
    prefix: tuple[int, ...]
    """Tokens that the tokenizer's own rules put before a text; ``encode`` does not."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32 [tokens]."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids; control tokens have none, and bytes that are no UTF-8 become U+FFFD."""


class SentencePieceTokenizer:
    """A sentencepiece model.

    Args:
        model_proto: content of the .model file.
        eod_token: the control token that ends a document. Unset: the model's end-of-sentence token, or one of ``EOD_TOKENS``.

    Raises:
        ValueError: the content is no sentencepiece model, or it has no such token.
    """

    def __init__(self, model_proto: bytes, eod_token: str | None = None) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
        except RuntimeError as error:
            raise ValueError(f"no sentencepiece model: {error}") from error
        self._state = (model_proto, eod_token)
        self.vocab_size: int = self._processor.vocab_size()
        named = {self._processor.id_to_piece(token): token for token in range(self.vocab_size) if self._processor.is_control(token)}
        if eod_token is None and self._processor.eos_id() >= 0:
            self.eod_id: int = self._processor.eos_id()
        else:
            self.eod_id = _find_eod(named, eod_token)
        self.fingerprint = _fingerprint("sentencepiece", model_proto, self.eod_id)
        # Whether to put the beginning-of-sentence token there is no part of a sentencepiece model.
        self.prefix: tuple[int, ...] = ()
        self._words = word_pattern(model_proto)
        self._encoded_words = _WordTable(self._processor)

    def __reduce__(self) -> tuple[type[SentencePieceTokenizer], tuple[bytes, str | None]]:
        return SentencePieceTokenizer, self._state

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32 [tokens].

        Where the model allows it (``word_pattern``), word by word through a table: about twice as fast on natural text and code, and slower
        only on text whose words hardly ever repeat.
        """
        if self._words is None:
            return [np.array(self._processor.encode(text), dtype=np.int32) for text in texts]
        words, table = self._words, self._encoded_words
        table.trim()
        return [np.frombuffer(b"".join(map(table.__getitem__, words.findall(text))), dtype=np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids."""
        return self._processor.decode([int(token) for token in ids])


class HuggingFaceTokenizer:
    """A tokenizer of the ``tokenizers`` library.

    Args:
        definition: content of a tokenizer.json.
        eod_token: the special token that ends a document. Unset: one of ``EOD_TOKENS``.

    Raises:
        ValueError: the content is no tokenizer, or it has no such token.
    """

    def __init__(self, definition: str, eod_token: str | None = None) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"no tokenizer.json: {error}") from error
        # Files often come with the truncation and padding their model was fine-tuned with.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # "</s>" inside a document is text, not its end.
        self._tokenizer.encode_special_tokens = True
        self._state = (definition, eod_token)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.eod_id: int = _find_eod(vocabulary, eod_token)
        self.fingerprint = _fingerprint("huggingface", definition.encode("utf-8"), self.eod_id)
        self.prefix: tuple[int, ...] = self._find_prefix()

    def __reduce__(self) -> tuple[type[HuggingFaceTokenizer], tuple[str, str | None]]:
        return HuggingFaceTokenizer, self._state

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_markup(self, text: str) -> list[int]:
        """Return the ids of a text in which control tokens are written out, as a chat template writes them."""
        return self._markup.encode(text, add_special_tokens=False).ids

    @cached_property
    def _markup(self) -> tokenizers.Tokenizer:
        # One of its own: whether control tokens are read is a switch of the whole tokenizer, which other threads use.
        tokenizer = tokenizers.Tokenizer.from_str(self._state[0])
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32 [tokens]."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def _find_prefix(self) -> tuple[int, ...]:
        probe = "a"
        plain, complete = self.encode(probe), self._tokenizer.encode(probe, add_special_tokens=True).ids
        first = next((start for start in range(len(complete)) if complete[start : start + len(plain)] == plain), 0)
        return tuple(complete[:first])


class Detokenizer:
    """Turns a growing sequence of ids into text piece by piece, never splitting a character that several tokens spell."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._shown = 0

    def feed(self, token: int) -> str:
        """Take one more id and return the text that it completes, which may be empty."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        before = self._tokenizer.decode(self._pending[: self._shown])
        if len(text) <= len(before) or text.endswith(_REPLACEMENT):
            return ""
        # Keep the last shown tokens as context: some decoders drop the leading space of the first token they are given.
        self._pending = self._pending[self._shown :]
        self._shown = len(self._pending)
        return text[len(before) :]

    def flush(self) -> str:
        """Return what is left at the end, with U+FFFD for an unfinished character."""
        text = self._tokenizer.decode(self._pending)
        before = self._tokenizer.decode(self._pending[: self._shown])
        self._pending, self._shown = [], 0
        return text[len(before) :]


def load_tokenizer(kind: Literal["sentencepiece", "huggingface"], path: Path, eod_token: str | None = None) -> Tokenizer:
    """Return the tokenizer at ``path``: a sentencepiece .model; or a tokenizer.json, or a folder for transformers' AutoTokenizer.

    Raises:
        ValueError: nothing is there, it is not of that kind, or it has no token that ends a document.
    """
    if not path.exists():
        raise ValueError(f"tokenizer {path} does not exist")
    try:
        if kind == "sentencepiece":
            if path.is_dir():
                raise ValueError("a sentencepiece tokenizer is a .model file, not a folder; for a folder set kind to huggingface")
            return SentencePieceTokenizer(path.read_bytes(), eod_token)
        definition, named_eod = _read_folder(path) if path.is_dir() else (_read_text(path), _eod_beside(path))
        return HuggingFaceTokenizer(definition, eod_token or named_eod)
    except ValueError as error:
        raise ValueError(f"tokenizer {path}: {error}") from error


def tokenizer_kind(path: Path) -> Literal["sentencepiece", "huggingface"]:
    """Return the kind that a path looks like: sentencepiece for a .model file, huggingface for anything else."""
    return "sentencepiece" if path.suffix == ".model" else "huggingface"


class _WordTable(dict[str, bytes]):
    """Word -> its ids as int32 bytes, filled as words are asked for."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        super().__init__()
        self._encode = processor.encode

    def __missing__(self, word: str) -> bytes:
        ids = array("i", self._encode(word)).tobytes()
        if len(word) <= _CACHED_WORD_LENGTH:
            self[word] = ids
        return ids

    def trim(self) -> None:
        """Forget everything once the table is full: common words are back within a document or two."""
        if len(self) > _CACHED_WORDS:
            self.clear()


def _fingerprint(kind: str, definition: bytes, eod_id: int) -> str:
    return hashlib.sha256(f"{kind} eod={eod_id} ".encode() + definition).hexdigest()


def _find_eod(tokens: dict[str, int], eod_token: str | None) -> int:
    candidates = EOD_TOKENS if eod_token is None else (eod_token,)
    for candidate in candidates:
        if candidate in tokens:
            return tokens[candidate]
    raise ValueError(
        f"none of its tokens is {' or '.join(candidates)}, to end documents with; name one that it has as the end-of-document token"
    )


def _eod_beside(definition: Path) -> str | None:
    """Return the end-of-sequence token that a tokenizer_config.json beside a tokenizer.json names, if there is one."""
    settings = definition.with_name("tokenizer_config.json")
    if not settings.exists():
        return None
    token = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
    return token["content"] if isinstance(token, dict) else token


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(
            "a huggingface tokenizer is a tokenizer.json or a folder, and this file is no text; for a sentencepiece .model set kind to "
            "sentencepiece"
        ) from None


def _read_folder(folder: Path) -> tuple[str, str | None]:
    """Return the definition and end-of-sequence token of the tokenizer that transformers finds in a folder."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError(
            "reading a tokenizer folder needs transformers, which is not installed; install it or name the tokenizer.json"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, KeyError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"transformers cannot read this folder: {first_line}") from error
    if not tokenizer.is_fast:
        raise ValueError("transformers has only a slow (Python) version of this tokenizer; convert it to a tokenizer.json first")
    return tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token
