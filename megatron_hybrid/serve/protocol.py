"""OpenAI's requests and answers, as far as they are met here.

A field that is not known is refused, and so is a known one with a value that would change the answer in a way that is not implemented:
nothing that is asked for is silently left out. Beyond OpenAI's there are vLLM's names for top_k, min_p, repetition_penalty, ignore_eos and
stop_token_ids.
"""

from __future__ import annotations

import secrets
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from megatron_hybrid.generate.sampling import Sampling

Prompt = str | list[int]
"""Text, or token ids."""


class ServeError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param = status, message, kind, param

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(_Part):
    """What a stream has beside the text."""

    include_usage: bool = False
    """A last chunk with the numbers of tokens."""


class GenerationRequest(_Part):
    """What both kinds of requests have."""

    model: str
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None)
    """-1 or 0 mean all tokens, as None does."""
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    n: int = Field(1, ge=1, le=64)
    seed: int | None = Field(None, ge=0, lt=2**62)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Whoever asks; nothing depends on it."""
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    @field_validator("presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _is_zero(cls, value: object) -> object:
        return 0 if value is None or value == 0 else value

    @field_validator("stop")
    @classmethod
    def _has_text(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 16 or not all(0 < len(stop) <= 1000 for stop in stops):
            raise ValueError("expected at most 16 texts of 1 to 1,000 characters")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts to end before."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        top_k = self.top_k if self.top_k is not None and self.top_k > 0 else None
        return Sampling(self.temperature, top_k, self.top_p, self.min_p, self.repetition_penalty)

    def seeds(self, count: int) -> list[int]:
        """One for each choice."""
        first = secrets.randbelow(2**31) if self.seed is None else self.seed
        return [first + number for number in range(count)]


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=1)
    echo: Literal[False] = False
    best_of: int | None = Field(None, ge=1, le=1)
    logprobs: None = None
    suffix: None = None

    def prompts(self) -> list[Prompt]:
        """One or several."""
        is_one = isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int))
        return [self.prompt] if is_one else list(self.prompt)


class TextPart(_Part):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Part):
    """What somebody said."""

    role: str
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        named = {"name": self.name} if self.name is not None else {}
        return {"role": self.role, "content": content} | named


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None
    tools: None = None
    response_format: None = None


class Answer:
    """Writes what comes of a request, whole or in chunks.

    Args:
        kind: "completion" or "chat".
        model: its name.
        prompt_tokens: of all prompts together.
    """

    def __init__(self, kind: Literal["completion", "chat"], model: str, prompt_tokens: int) -> None:
        self._kind, self._prompt_tokens = kind, prompt_tokens
        name = "text_completion" if kind == "completion" else "chat.completion"
        prefix = "cmpl" if kind == "completion" else "chatcmpl"
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "object": name, "created": int(time.time()), "model": model}

    def whole(self, texts: list[str], endings: list[str], new_tokens: int) -> dict[str, Any]:
        """The answer to a request without streaming."""
        choices = []
        for index, (text, ending) in enumerate(zip(texts, endings, strict=True)):
            body = {"text": text} if self._kind == "completion" else {"message": {"role": "assistant", "content": text}}
            choices.append({"index": index, **body, "logprobs": None, "finish_reason": ending})
        return self._head | {"choices": choices, "usage": self.usage(new_tokens)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a choice's stream begins with: a chat's role."""
        return None if self._kind == "completion" else self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def chunk(self, index: int, text: str, ending: str | None) -> dict[str, Any]:
        """A piece of a choice's text."""
        body = {"text": text} if self._kind == "completion" else {"delta": {"content": text} if text else {}}
        return self._chunk(index, body, ending)

    def closing(self, new_tokens: int) -> dict[str, Any]:
        """The chunk with the numbers of tokens."""
        return self._chunk_head() | {"choices": [], "usage": self.usage(new_tokens)}

    def usage(self, new_tokens: int) -> dict[str, int]:
        """Numbers of tokens."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": self._prompt_tokens + new_tokens,
        }

    def _chunk(self, index: int, body: dict[str, Any], ending: str | None) -> dict[str, Any]:
        return self._chunk_head() | {"choices": [{"index": index, **body, "logprobs": None, "finish_reason": ending}]}

    def _chunk_head(self) -> dict[str, Any]:
        return self._head if self._kind == "completion" else self._head | {"object": "chat.completion.chunk"}
