"""Text in, text out, a token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_hybrid.data.tokenizer import Detokenizer, Tokenizer
from megatron_hybrid.generate.decode import generate_tokens
from megatron_hybrid.generate.load import LanguageModel
from megatron_hybrid.generate.sampling import Sampling


@dataclass(frozen=True)
class Piece:
    """One generated token."""

    token: int
    text: str
    """What it adds to the text: nothing in the middle of a character that several tokens spell, nor at the end of a document."""


def encode_prompt(prompt: str, tokenizer: Tokenizer, *, resets_at_documents: bool) -> list[int]:
    """Return the tokens of a prompt that begins a document, as training showed the beginnings of documents.

    With ``resets_at_documents`` a document began from an empty state, which is what new caches hold, with its own first token, and nothing
    ever came after an end-of-document token. Without, a document came after that token of the one before, so it comes first here too.

    Raises:
        ValueError: the prompt is empty or no Unicode text.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is no Unicode text: {error.reason} at character {error.start}; write it in UTF-8") from None
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise ValueError(f"the prompt {prompt!r} has no tokens; give it at least one character for the model to continue")
    return tokens if resets_at_documents else [tokenizer.eod_id, *tokens]


def stream_text(
    language_model: LanguageModel, prompt: Sequence[int], *, max_new_tokens: int, sampling: Sampling, seed: int
) -> Iterator[Piece]:
    """Continue the prompt (``encode_prompt``) until its document ends or there are ``max_new_tokens``.

    Raises:
        ValueError: the model gives logits that are not finite.
    """
    tokenizer = language_model.tokenizer
    detokenizer = Detokenizer(tokenizer)
    for token in prompt:
        # Not to be shown: some decoders drop the leading space of the first token they are given, which the first new one must not be.
        detokenizer.feed(token)
    tokens = generate_tokens(
        language_model.model,
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
    )
    for count, token in enumerate(tokens, start=1):
        is_end = token == tokenizer.eod_id
        text = "" if is_end else detokenizer.feed(token)
        if is_end or count == max_new_tokens:
            text += detokenizer.flush()
        yield Piece(token, text)
