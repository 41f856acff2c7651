"""What a request may say: whatever OpenAI's clients send that changes nothing, and nothing that would be left out silently."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_hybrid.serve.protocol import ChatRequest, CompletionRequest, ServeError, refusal

MESSAGES = [{"role": "user", "content": "a"}]


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, {"model": "small", "prompt": "a"} | fields)


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, {"model": "small", "messages": MESSAGES} | fields)


def parse(kind: type[Any], fields: dict[str, Any]) -> Any:
    """As the server does."""
    try:
        return kind.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise refusal(error) from None


def test_null_is_the_default() -> None:
    names = ("temperature", "top_p", "n", "stream", "max_tokens", "seed", "stop", "stream_options", "logit_bias", "user", "top_k", "min_p")
    assert completion(**dict.fromkeys((*names, "echo", "logprobs", "suffix", "best_of"))) == completion()
    assert (
        chat(**dict.fromkeys((*names, "max_completion_tokens", "top_logprobs", "tools", "response_format", "reasoning_effort"))) == chat()
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": False},
        {"parallel_tool_calls": True},
        {"store": False, "metadata": {}},
        {"logprobs": False, "top_logprobs": 0},
        {"presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}},
    ],
)
def test_what_changes_nothing_is_taken(fields: dict[str, Any]) -> None:
    assert chat(**fields) == chat()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"response_format": {"type": "json_object"}},
            'response_format is not implemented here; leave it out, or give {"type": "text"} or',
        ),
        ({"tools": [{"type": "function"}]}, "tools is not implemented"),
        ({"tool_choice": "required"}, 'tool_choice is not implemented here; leave it out, or give "none" or "auto" or null'),
        ({"store": True}, "store is not implemented"),
        ({"logprobs": True}, "logprobs is not implemented"),
        ({"presence_penalty": False}, "presence_penalty is not implemented"),
        ({"surprise": None}, "surprise: Extra inputs are not permitted"),
        ({"temperature": True}, "temperature: Input should be a valid number"),
        ({"n": "2"}, "n: Input should be a valid integer"),
        ({"messages": None}, "messages: Input should be a valid"),
        ({"messages": [{"role": "user", "content": None}]}, "a message of the user needs a content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "tool_calls is not implemented"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ServeError) as caught:
        chat(**fields)
    assert message in caught.value.message and caught.value.status == 400, caught.value.message
    assert caught.value.param in (*fields, "tool_calls")


def test_an_assistant_may_have_said_nothing() -> None:
    messages = chat(messages=[*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [], "refusal": None}]).messages
    assert messages[1].plain() == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("prompt", [[True], [1.5], [[True]], None, 1])
def test_a_prompt_is_text_or_whole_numbers(prompt: Any) -> None:
    with pytest.raises(ServeError, match=r"prompt\.list\[int\]") as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


def test_seeds_of_openais_range_are_taken_and_repeat() -> None:
    for seed in (-1, -(2**63), 2**63 - 1, 5):
        seeds = completion(seed=seed).seeds(3)
        assert seeds == completion(seed=seed).seeds(3) and all(0 <= each < 2**63 for each in seeds) and len(set(seeds)) == 3
    assert completion(seed=5).seeds(2) == [5, 6]
