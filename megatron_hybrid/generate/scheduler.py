"""Many requests through one engine: waiting ones take slots as they become free, while the others go on.

A round reads a piece of waiting prompts and gives every sequence one token. On a GPU a few steps are under way before the first one's
tokens are looked at, so that the host never keeps it waiting; what a sequence got beyond its end is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.generate.engine import Engine, Start, StepTokens, check_finite
from megatron_hybrid.generate.ranks import Leader
from megatron_hybrid.generate.sampling import Sampling
from megatron_hybrid.generate.text import TextStream

STEPS_AHEAD = 3
"""Steps under way at a time on a GPU: enough to hide the host's work, few enough that a stopped sequence costs little."""

Ending = Literal["stop", "length"]
"""stop: an end token or a stop string came. length: as many tokens as were asked for."""


@dataclass(frozen=True)
class Request:
    """A prompt and what is wanted of it."""

    key: Hashable
    """Tells requests under way apart."""
    prompt: Sequence[int]
    """Token ids, at least one."""
    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...] = ()
    """Strings that end the text; not shown."""
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end the text; not shown."""


@dataclass(frozen=True)
class Event:
    """Something new of a request."""

    key: Hashable
    token: int | None
    """The token that came; None when only an error did."""
    text: str
    """What it adds to the text: nothing in the middle of a character or of what may become a stop string."""
    ending: Ending | None = None
    """Why this is the last event; None while more will come."""
    error: str | None = None
    """What went wrong; the last event too."""


@dataclass
class _Sequence:
    request: Request
    text: TextStream
    slot: int | None = None
    num_launched: int = 0
    """Tokens that are chosen or on their way."""
    num_tokens: int = 0
    """Tokens that arrived."""
    is_over: bool = False


@dataclass
class _Step:
    tokens: StepTokens
    sequences: dict[int, _Sequence] = field(default_factory=dict)
    """By slot, as they were when the step was launched."""


class Scheduler:
    """Requests under way and waiting, over an engine that nobody else uses.

    Args:
        engine: the engine, or the leader of several ranks' engines.
        tokenizer: makes tokens into text.
        steps_ahead: steps that may be under way before their tokens are looked at; 0 on a CPU, which does nothing meanwhile.
    """

    def __init__(self, engine: Engine | Leader, tokenizer: Tokenizer, *, steps_ahead: int) -> None:
        self._engine, self._tokenizer, self._steps_ahead = engine, tokenizer, steps_ahead
        self._waiting: deque[_Sequence] = deque()
        self._prefilling: list[_Sequence] = []
        self._running: dict[int, _Sequence] = {}
        self._under_way: deque[_Step] = deque()
        self._by_key: dict[Hashable, _Sequence] = {}

    @property
    def has_work(self) -> bool:
        """Whether some request is not over."""
        return bool(self._by_key)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    def check(self, request: Request) -> None:
        """Tell whether a request can be met.

        Raises:
            ValueError: it asks for more tokens than there is room for, or for none.
        """
        total = len(request.prompt) + request.max_new_tokens
        if not request.prompt or request.max_new_tokens < 1:
            raise ValueError("a request needs at least one prompt token, and at least one new token")
        if total > self._engine.max_length:
            raise ValueError(
                f"{len(request.prompt):,} prompt tokens and {request.max_new_tokens:,} new ones are {total:,}, but there is room for "
                f"{self._engine.max_length:,}; shorten the prompt or ask for fewer"
            )

    def submit(self, request: Request) -> None:
        """Let a request wait for a slot.

        Raises:
            ValueError: see ``check``.
        """
        self.check(request)
        assert request.key not in self._by_key, request.key
        sequence = _Sequence(request, TextStream(self._tokenizer, request.prompt, request.stop))
        self._by_key[request.key] = sequence
        self._waiting.append(sequence)

    def cancel(self, key: Hashable) -> None:
        """Forget a request and free its slot; no more events come of it. Does nothing where it is over."""
        sequence = self._by_key.pop(key, None)
        if sequence is not None:
            self._end(sequence)
            if sequence in self._waiting:
                self._waiting.remove(sequence)

    def advance(self) -> list[Event]:
        """Run a round; return what came of it."""
        events: list[Event] = []
        if not self._prefilling and self._waiting:
            self._admit()
        if self._prefilling:
            events += self._prefill()
        if self._running:
            self._launch()
        while len(self._under_way) > (self._steps_ahead if self._running else 0):
            events += self._arrive(self._under_way.popleft())
        return events

    def _admit(self) -> None:
        """Begin to read the first waiting prompts, as many as fit side by side into one piece."""
        slots = self._free_slots()
        chosen: list[_Sequence] = []
        longest = 0
        while self._waiting and len(chosen) < len(slots):
            longest = max(longest, len(self._waiting[0].request.prompt))
            if chosen and (len(chosen) + 1) * longest > self._engine.prefill_tokens:
                break
            chosen.append(self._waiting.popleft())
        if not chosen:
            return
        chosen.sort(key=lambda sequence: -len(sequence.request.prompt))
        for sequence, slot in zip(chosen, slots):
            sequence.slot = slot
        starts = [Start(each.request.prompt, each.request.sampling, each.request.seed) for each in chosen]
        self._engine.begin(slots.start, starts)
        self._prefilling = chosen

    def _free_slots(self) -> range:
        """The first run of free slots."""
        size = self._engine.max_batch_size
        first = next((slot for slot in range(size) if slot not in self._running), size)
        return range(first, next((slot for slot in range(first, size) if slot in self._running), size))

    def _prefill(self) -> list[Event]:
        tokens = self._engine.prefill_piece()
        if tokens is None:
            return []
        events, sequences, self._prefilling = [], self._prefilling, []
        for sequence, token in zip(sequences, tokens, strict=True):
            self._running[sequence.slot] = sequence
            if sequence.is_over:
                self._free(sequence)
            else:
                self._count_launch(sequence)
                events += self._take(sequence, token)
        return events

    def _launch(self) -> None:
        self._under_way.append(_Step(self._engine.step(), dict(self._running)))
        for sequence in list(self._running.values()):
            self._count_launch(sequence)

    def _count_launch(self, sequence: _Sequence) -> None:
        """A sequence's last token is known by number, wherever the tokens are: its slot is free at once."""
        sequence.num_launched += 1
        if sequence.num_launched == sequence.request.max_new_tokens:
            self._free(sequence)

    def _arrive(self, step: _Step) -> list[Event]:
        tokens = step.tokens.fetch()
        return [event for slot, sequence in step.sequences.items() if not sequence.is_over for event in self._take(sequence, tokens[slot])]

    def _take(self, sequence: _Sequence, token: int) -> list[Event]:
        request = sequence.request
        sequence.num_tokens += 1
        try:
            check_finite(token, len(request.prompt) + sequence.num_tokens - 1)
        except ValueError as error:
            self._end(sequence)
            return [Event(request.key, None, "", error=str(error))]
        is_end = token in request.stop_tokens
        text = "" if is_end else sequence.text.feed(token)
        is_last = sequence.num_tokens == request.max_new_tokens
        if is_end or (is_last and not sequence.text.is_stopped):
            text += sequence.text.flush()
        is_end = is_end or sequence.text.is_stopped
        if is_end or is_last:
            self._end(sequence)
        return [Event(request.key, token, text, ending="stop" if is_end else "length" if is_last else None)]

    def _end(self, sequence: _Sequence) -> None:
        sequence.is_over = True
        self._by_key.pop(sequence.request.key, None)
        self._free(sequence)

    def _free(self, sequence: _Sequence) -> None:
        if sequence.slot is not None and self._running.get(sequence.slot) is sequence:
            del self._running[sequence.slot]
            self._engine.release(sequence.slot)
