"""OpenAI's requests and answers, as far as they are met here.

A field that is not known is refused, and so is a known one with a value that would change the answer in a way that is not implemented:
nothing that is asked for is silently left out. null stands for a field's default. Beyond OpenAI's there are vLLM's names for top_k, min_p,
repetition_penalty, ignore_eos and stop_token_ids.
"""

from __future__ import annotations

import json
import secrets
import time
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from megatron_hybrid.generate.sampling import Sampling

Prompt = str | list[int]
"""Text, or token ids."""
_PROBLEMS_SHOWN = 4


class ServeError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param = status, message, kind, param

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}}


def refusal(error: ValidationError) -> ServeError:
    """What the sender of a request is told of its first wrong field: what each kind that it may be of expects."""
    problems = error.errors(include_url=False)
    place = problems[0]["loc"][:1]
    texts = [f"{'.'.join(map(str, each['loc'])) or 'body'}: {each['msg']}" for each in problems if each["loc"][:1] == place]
    return ServeError(400, "; ".join(texts[:_PROBLEMS_SHOWN]), param=str(place[0]) if place else None)


class _Part(BaseModel):
    # Strict: true is no number, and "5" neither.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    not_implemented: ClassVar[dict[str, tuple[object, ...]]] = {}
    """OpenAI's fields that only take the values named here, which change nothing."""

    @model_validator(mode="before")
    @classmethod
    def _without_defaults(cls, fields: object) -> object:
        """Leave out what says nothing: null where a field has a default, and neutral values of what is not implemented.

        Raises:
            ServeError: a field that is not implemented has another value.
        """
        if not isinstance(fields, dict):
            return fields
        kept = {}
        for name, value in fields.items():
            if name not in cls.not_implemented:
                if value is not None or name not in cls.model_fields or cls.model_fields[name].is_required():
                    kept[name] = value
            elif value is not None and not any(
                value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in cls.not_implemented[name]
            ):
                choices = " or ".join(map(json.dumps, (*cls.not_implemented[name], None)))
                raise ServeError(400, f"{name} is not implemented here; leave it out, or give {choices}", param=name)
        return kept


class StreamOptions(_Part):
    """What a stream has beside the text."""

    not_implemented = {"include_obfuscation": (False,)}
    include_usage: bool = False
    """A last chunk with the numbers of tokens."""


class GenerationRequest(_Part):
    """What both kinds of requests have."""

    not_implemented = {
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "metadata": ({},),
        "presence_penalty": (0,),
        "service_tier": ("auto", "default"),
        "store": (False,),
    }
    model: str
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None)
    """-1 or 0 mean all tokens, as None does."""
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    n: int = Field(1, ge=1, le=64)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Whoever asks; nothing depends on it."""

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
        # The engine's are 0 to 2^63 - 1, and further choices count on from the first.
        first = secrets.randbelow(2**31) if self.seed is None else self.seed % 2**62
        return [first + number for number in range(count)]


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    not_implemented = GenerationRequest.not_implemented | {"best_of": (1,), "echo": (False,), "logprobs": (), "suffix": ("",)}
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=1)

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

    not_implemented = {"audio": (), "function_call": (), "refusal": (), "tool_calls": ([],)}
    role: str
    content: str | list[TextPart] = ""
    name: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError(f"a message of the {self.role} needs a content")
        return self

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        named = {"name": self.name} if self.name is not None else {}
        return {"role": self.role, "content": content} | named


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    not_implemented = GenerationRequest.not_implemented | {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "logprobs": (False,),
        "modalities": (["text"],),
        # Of tools, of which there are none.
        "parallel_tool_calls": (False, True),
        "prediction": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "web_search_options": (),
    }
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


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
