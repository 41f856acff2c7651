"""The thread that generates: requests come in from the server's event loop, events go back to it.

The number of requests that are not over is bounded, so that a server that is asked for too much says so at once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

import torch

from megatron_hybrid.generate.scheduler import Event, Request
from megatron_hybrid.generate.session import Session

_KEEP_ALIVE_S = 5.0

_log = logging.getLogger(__name__)


class Busy(Exception):
    """As many requests are under way and waiting as may be."""


class Worker:
    """Generates in a thread of its own; everything but ``run`` is called from the event loop.

    Args:
        session: the loaded model; nobody else uses its engine.
        max_waiting: requests that may wait for a slot.
        on_failure: called, from the thread, when generating fails for good.
    """

    def __init__(self, session: Session, *, max_waiting: int, on_failure: Callable[[], None]) -> None:
        self.session = session
        self.max_requests = session.engine.max_batch_size + max_waiting
        self.failure: Exception | None = None
        """What ended the thread, where it was not asked to end."""
        self._on_failure = on_failure
        self._streams: dict[int, asyncio.Queue[Event]] = {}
        self._numbers = itertools.count()
        self._inbox: queue.SimpleQueue[Request | int | None] = queue.SimpleQueue()
        self._scheduler = session.new_scheduler()
        self._thread = threading.Thread(target=self._run, name="generate")

    @property
    def num_open(self) -> int:
        """Requests that are not over."""
        return len(self._streams)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return self._scheduler.num_waiting

    def start(self) -> None:
        """Begin; in the event loop that events are for."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, whatever is under way."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def check(self, request: Request) -> None:
        """Tell whether a request can be met.

        Raises:
            ValueError: it asks for more tokens than there is room for.
        """
        self._scheduler.check(request)

    async def events(self, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Event], None]:
        """Run requests together and yield their events, each with its request's place in the sequence, until all are over. Closing the
        iterator early cancels what is left.

        Raises:
            Busy: there is no room for all of them.
        """
        if self.num_open + len(requests) > self.max_requests or self.failure is not None:
            raise Busy
        stream: asyncio.Queue[Event] = asyncio.Queue()
        places = {next(self._numbers): place for place, _ in enumerate(requests)}
        self._streams |= dict.fromkeys(places, stream)
        try:
            for key, place in places.items():
                self._inbox.put(replace(requests[place], key=key))
            left = set(places)
            while left:
                event = await stream.get()
                if event.ending is not None or event.error is not None:
                    left.discard(event.key)
                    self._streams.pop(event.key, None)
                yield places[event.key], event
        finally:
            for key in places:
                if self._streams.pop(key, None) is not None:
                    self._inbox.put(key)

    def _run(self) -> None:
        device = next(self.session.language_model.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            while self._take_in():
                events = self._scheduler.advance()
                if events:
                    self._loop.call_soon_threadsafe(self._hand_out, events)
        except Exception as error:
            _log.exception("generating failed")
            self.failure = error
            self._loop.call_soon_threadsafe(self._give_up, f"{type(error).__name__}: {error}")
            self._on_failure()

    def _take_in(self) -> bool:
        """Take in what has come, waiting for something where there is nothing to do; False when asked to end."""
        while True:
            try:
                item = self._inbox.get(block=not self._scheduler.has_work, timeout=_KEEP_ALIVE_S)
            except queue.Empty:
                if self._scheduler.has_work:
                    return True
                self.session.keep_alive()
                continue
            if item is None:
                return False
            if isinstance(item, Request):
                self._scheduler.submit(item)
            else:
                self._scheduler.cancel(item)

    def _hand_out(self, events: list[Event]) -> None:
        for event in events:
            if event.key in self._streams:
                self._streams[event.key].put_nowait(event)

    def _give_up(self, reason: str) -> None:
        for key, stream in self._streams.items():
            stream.put_nowait(Event(key, None, "", error=reason))
