"""The HTTP endpoints: models, completions, chats and health."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from megatron_hybrid.generate.chat import ChatWriter
from megatron_hybrid.generate.scheduler import Event, Request
from megatron_hybrid.serve.protocol import Answer, ChatRequest, CompletionRequest, GenerationRequest, Prompt, ServeError, refusal
from megatron_hybrid.serve.worker import Busy, Worker

_BODY_TIMEOUT_S = 30.0
_CLIENT_CLOSED = 499
BodyT = TypeVar("BodyT", bound=BaseModel)
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_tokens: int
    """New tokens of a choice."""
    max_body_bytes: int


class Endpoints:
    """The handlers of one served model.

    Args:
        worker: generates.
        model_name: what clients call the model.
        limits: of a request.
    """

    def __init__(self, worker: Worker, model_name: str, limits: Limits) -> None:
        self._worker, self._model_name, self._limits = worker, model_name, limits
        self._started_s = int(time.time())
        self._chat: ChatWriter | None = None
        self._no_chat = ""
        try:
            self._chat = ChatWriter(worker.session.language_model)
        except ValueError as error:
            self._no_chat = str(error)

    def app(self) -> Starlette:
        """The application; its lifespan is the worker's."""
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
        ]
        handlers = {ServeError: _answer_error, HTTPException: _answer_http_error}
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._worker.start()
        try:
            yield
        finally:
            await run_in_threadpool(self._worker.stop)

    async def health(self, http: HttpRequest) -> Response:
        """Whether requests can be met, and how many are under way."""
        worker = self._worker
        state = {"status": "ok", "open": worker.num_open, "waiting": worker.num_waiting, "max_open": worker.max_requests}
        if worker.failure is not None:
            return JSONResponse(state | {"status": "failed"}, status_code=503)
        return JSONResponse(state)

    async def models(self, http: HttpRequest) -> Response:
        """The one model, as a list."""
        return JSONResponse({"object": "list", "data": [self._model_facts()]})

    async def model(self, http: HttpRequest) -> Response:
        """The one model, asked for by its name."""
        self._check_name(http.path_params["name"])
        return JSONResponse(self._model_facts())

    def _model_facts(self) -> dict[str, Any]:
        max_length = self._worker.session.engine.max_length
        model = {"id": self._model_name, "object": "model", "created": self._started_s, "owned_by": "megatron_hybrid"}
        return model | {"max_model_len": max_length}

    def _check_name(self, name: str) -> None:
        if name != self._model_name:
            raise ServeError(404, f"there is no model {name!r} here; there is {self._model_name!r}", param="model")

    async def completions(self, http: HttpRequest) -> Response:
        """Continue prompts."""
        body = await self._read(http, CompletionRequest)
        prompts = [await run_in_threadpool(self._encode, prompt) for prompt in body.prompts()]
        if not prompts:
            raise ServeError(400, "prompt is empty; give a text, token ids, or a list of either", param="prompt")
        return await self._generate(http, body, prompts, body.max_tokens, Answer("completion", self._model_name, sum(map(len, prompts))))

    async def chat_completions(self, http: HttpRequest) -> Response:
        """Answer a chat."""
        body = await self._read(http, ChatRequest)
        if self._chat is None:
            raise ServeError(400, self._no_chat)
        try:
            prompt = await run_in_threadpool(self._chat.encode, [message.plain() for message in body.messages])
        except ValueError as error:
            raise ServeError(400, str(error), param="messages") from error
        room = self._worker.session.engine.max_length - len(prompt)
        max_tokens = body.max_completion_tokens or body.max_tokens or max(1, min(room, self._limits.max_tokens))
        return await self._generate(http, body, [prompt], max_tokens, Answer("chat", self._model_name, len(prompt)))

    async def _read(self, http: HttpRequest, kind: type[BodyT]) -> BodyT:
        """The request's body, checked.

        Raises:
            ServeError: it is too large, too slow, no JSON, not what was expected, or for another model.
        """
        limit = self._limits.max_body_bytes
        too_large = ServeError(413, f"the request's body is larger than {limit:,} bytes")
        if int(http.headers.get("content-length", "0") or 0) > limit:
            raise too_large

        async def receive() -> bytes:
            received = bytearray()
            async for part in http.stream():
                received += part
                if len(received) > limit:
                    raise too_large
            return bytes(received)

        try:
            body = kind.model_validate_json(await asyncio.wait_for(receive(), _BODY_TIMEOUT_S))
        except asyncio.TimeoutError:
            raise ServeError(408, f"the request's body did not come within {_BODY_TIMEOUT_S:.0f} s") from None
        except ClientDisconnect:
            raise ServeError(_CLIENT_CLOSED, "the client went away") from None
        except ValidationError as error:
            raise refusal(error) from None
        self._check_name(body.model)
        return body

    def _encode(self, prompt: Prompt) -> list[int]:
        session = self._worker.session
        if isinstance(prompt, str):
            try:
                return session.encode(prompt)
            except ValueError as error:
                raise ServeError(400, str(error), param="prompt") from error
        vocab_size = session.language_model.tokenizer.vocab_size
        if not prompt or not all(0 <= token < vocab_size for token in prompt):
            raise ServeError(400, f"a prompt of token ids needs at least one, all from 0 to {vocab_size - 1}", param="prompt")
        return prompt

    async def _generate(
        self, http: HttpRequest, body: GenerationRequest, prompts: Sequence[list[int]], max_tokens: int, answer: Answer
    ) -> Response:
        """Run every choice of every prompt, and answer whole or in chunks."""
        if max_tokens > self._limits.max_tokens:
            raise ServeError(400, f"max_tokens={max_tokens:,} is more than this server's {self._limits.max_tokens:,}", param="max_tokens")
        if len(prompts) * body.n > self._worker.max_requests:
            raise ServeError(400, f"{len(prompts) * body.n} choices are more than the {self._worker.max_requests} that fit here", param="n")
        end_tokens = frozenset() if body.ignore_eos else self._worker.session.language_model.companions.end_tokens
        choices = [prompt for prompt in prompts for _ in range(body.n)]
        try:
            requests = [
                Request(0, prompt, max_tokens, body.sampling(), seed, body.stops, end_tokens | frozenset(body.stop_token_ids))
                for prompt, seed in zip(choices, body.seeds(len(choices)), strict=True)
            ]
            for request in requests:
                self._worker.check(request)
        except ValueError as error:
            raise ServeError(400, str(error)) from error
        events = self._worker.events(requests)
        try:
            # Whether there is room shows here, while there is still a status to answer with.
            first = await _unless_gone(http, anext(events))
        except Busy:
            await events.aclose()
            if self._worker.failure is not None:
                raise ServeError(503, "the server cannot generate any more", kind="server_error") from None
            raise ServeError(429, "too many requests are waiting; try again later", kind="rate_limit_error") from None
        except ServeError:
            await events.aclose()
            raise
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(
                _chunks(first, events, answer, len(requests), include_usage=include_usage),
                media_type="text/event-stream",
                headers={"cache-control": "no-cache"},
            )
        async with aclosing(events):
            return await _unless_gone(http, _whole(first, events, answer, len(requests)))


async def _whole(first: tuple[int, Event], events: AsyncGenerator[tuple[int, Event], None], answer: Answer, num_choices: int) -> Response:
    texts, endings, new_tokens = [""] * num_choices, [""] * num_choices, 0
    async for place, event in _after(first, events):
        if event.error is not None:
            raise ServeError(500, event.error, kind="server_error")
        texts[place] += event.text
        endings[place] = event.ending or ""
        new_tokens += 1
    return JSONResponse(answer.whole(texts, endings, new_tokens))


async def _chunks(
    first: tuple[int, Event], events: AsyncGenerator[tuple[int, Event], None], answer: Answer, num_choices: int, *, include_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events. A client that goes away closes this, and with it ``events``."""
    new_tokens = 0
    async with aclosing(events):
        for index in range(num_choices):
            if (opening := answer.opening(index)) is not None:
                yield _server_sent(opening)
        async for place, event in _after(first, events):
            if event.error is not None:
                yield _server_sent(ServeError(500, event.error, kind="server_error").body())
                return
            new_tokens += 1
            if event.text or event.ending is not None:
                yield _server_sent(answer.chunk(place, event.text, event.ending))
        if include_usage:
            yield _server_sent(answer.closing(new_tokens))
        yield b"data: [DONE]\n\n"


async def _after(first: tuple[int, Event], events: AsyncGenerator[tuple[int, Event], None]) -> AsyncIterator[tuple[int, Event]]:
    yield first
    async for each in events:
        yield each


async def _unless_gone(http: HttpRequest, work: Awaitable[ResultT]) -> ResultT:
    """Await ``work``, but not longer than the client stays.

    Raises:
        ServeError: the client went away.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ServeError(_CLIENT_CLOSED, "the client went away")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _server_sent(content: object) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


async def _answer_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    headers = {"retry-after": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _answer_http_error(http: HttpRequest, error: Exception) -> Response:
    """No such path, or another method."""
    assert isinstance(error, HTTPException)
    return JSONResponse(
        ServeError(error.status_code, f"{http.method} {http.url.path}: {error.detail}").body(), status_code=error.status_code
    )
