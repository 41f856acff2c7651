"""Training a sentencepiece tokenizer that gives back every text exactly, source code included."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import sentencepiece

_MAX_SENTENCE_BYTES = 1 << 30


def train_sentencepiece(documents: Iterable[str], vocab_size: int, *, max_bytes: int = 64 << 20, eod_token: str = "<|eod|>") -> bytes:
    """Train a BPE model with byte fallback and return the content of its .model file. The same documents give the same bytes.

    No normalisation, no leading space, all white space kept: decoding an encoded text returns it, whatever it holds. The one exception is
    U+2581, which is sentencepiece's own sign for a space and comes back as one. Digits stay apart. Id 0 is the unknown token (never used,
    thanks to the bytes) and id 1 is ``eod_token``, a control token that no text produces.

    Args:
        documents: text to learn from; reading stops after ``max_bytes`` of UTF-8.
        vocab_size: entries, bytes and control tokens included.

    Raises:
        ValueError: there is no text, or it does not support a vocabulary of this size.
    """
    written = io.BytesIO()
    sample = list(_first_bytes(documents, max_bytes))
    if not sample:
        raise ValueError("cannot train a tokenizer: the documents hold no text")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=eod_token,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"cannot train a tokenizer of {vocab_size} entries: {error}; give more text or another vocabulary size") from error
    return written.getvalue()


def _first_bytes(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
    taken = 0
    for document in documents:
        if taken >= max_bytes:
            return
        size_bytes = len(document.encode("utf-8"))
        taken += size_bytes
        if size_bytes:
            yield document
