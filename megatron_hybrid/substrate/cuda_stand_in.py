"""What ``torch.cuda`` means to megatron-core on a host without CUDA: the CPU, one stream, work done when the call returns.

Only rewritten megatron-core modules see this module (rule R1 of ``rewrite``); torch itself is never changed. Random state is the
CPU generator's, so megatron-core's own RNG tracker works as it is. A name that is not here raises: megatron-core then
asks for something that a CPU cannot do.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

FloatTensor = torch.FloatTensor
HalfTensor = torch.HalfTensor
BFloat16Tensor = torch.BFloat16Tensor
OutOfMemoryError = torch.cuda.OutOfMemoryError
CPU = torch.device("cpu")

# megatron-core indexes this with current_device().
default_generators = {CPU: torch.default_generator}


class Stream:
    """The one queue of a CPU: everything issued earlier has already finished."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event


class Event:
    """A point in time; waiting for it returns at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recorded_s = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._recorded_s = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds between two recordings, as torch.cuda.Event has it."""
        return 1e3 * (end._recorded_s - self._recorded_s)


class _NeedsCuda:
    """A class that megatron-core names in annotations and checks, and that cannot exist here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"megatron-core asked for torch.cuda.{type(self).__name__}, which a host without CUDA does not have")


class CUDAGraph(_NeedsCuda): ...


class MemPool(_NeedsCuda): ...


class ExternalStream(_NeedsCuda): ...


def __getattr__(name: str) -> Any:
    raise AttributeError(f"megatron-core asked for torch.cuda.{name}, which a host without CUDA does not have")


def is_available() -> bool:
    return False


def device_count() -> int:
    return 0


def current_device() -> torch.device:
    return CPU


def set_device(device: Any) -> None: ...


def synchronize(device: Any = None) -> None: ...


def empty_cache() -> None: ...


def memory_stats(device: Any = None) -> dict[str, int]:
    return {}


def memory_allocated(device: Any = None) -> int:
    return 0


def memory_reserved(device: Any = None) -> int:
    return 0


def current_stream(device: Any = None) -> Stream:
    return Stream()


default_stream = current_stream


def set_stream(stream: Stream) -> None: ...


@contextlib.contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    yield


@contextlib.contextmanager
def device(device: Any) -> Iterator[None]:
    yield


def manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


def get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(state)


def _lazy_call(callback: Callable[[], None], **kwargs: Any) -> None:
    # torch.cuda queues the call until CUDA starts, which would lose it here.
    callback()


def _lazy_init() -> None: ...


def _no_range(*args: Any, **kwargs: Any) -> None: ...


random = SimpleNamespace(get_rng_state=get_rng_state, set_rng_state=set_rng_state)
nvtx = SimpleNamespace(range_push=_no_range, range_pop=_no_range, range=lambda *args, **kwargs: contextlib.nullcontext())
amp = SimpleNamespace(
    custom_fwd=functools.partial(torch.amp.custom_fwd, device_type="cpu"),
    custom_bwd=functools.partial(torch.amp.custom_bwd, device_type="cpu"),
)
