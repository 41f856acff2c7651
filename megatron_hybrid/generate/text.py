"""Text in, text out: prompts as tokens, and new tokens as text that stops where it should."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hybrid.data.tokenizer import Detokenizer, Tokenizer

_CONTEXT_TOKENS = 32
"""Of a prompt, that a decoder sees before the first new token."""


def encode_prompt(prompt: str, tokenizer: Tokenizer, prefix: Sequence[int] = ()) -> list[int]:
    """Return the tokens of a prompt that begins a document.

    Args:
        prompt: the text.
        tokenizer: the model's.
        prefix: tokens that come before a document's own first (``LanguageModel.prompt_prefix``).

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
    return [*prefix, *tokens]


class TextStream:
    """Makes a prompt's new tokens into text, piece by piece: no piece splits a character, and none holds a part of a stop string.

    Args:
        tokenizer: the model's.
        prompt: tokens that came before.
        stop: strings that end the text; neither they nor what follows is shown.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.is_stopped = False
        """Whether a stop string has come."""
        for token in prompt[-_CONTEXT_TOKENS:]:
            # Not to be shown: some decoders drop the leading space of the first token they are given, which the first new one must not be.
            self._detokenizer.feed(token)

    def feed(self, token: int) -> str:
        """Take one more token and return the text that is certain now, which may be empty."""
        return self._show(self._detokenizer.feed(token), is_end=False)

    def flush(self) -> str:
        """Return what is left at the end, with U+FFFD for an unfinished character."""
        return self._show(self._detokenizer.flush(), is_end=True)

    def _show(self, text: str, *, is_end: bool) -> str:
        if self.is_stopped:
            return ""
        text, self._held = self._held + text, ""
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            return text[: min(places)]
        if is_end:
            return text
        shown = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[shown:]
        return text[:shown]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that the stop string begins with."""
    return next((length for length in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:length])), 0)
