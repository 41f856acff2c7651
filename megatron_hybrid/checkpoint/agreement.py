"""Failing on every rank when one of them fails, and telling all ranks what each of them knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_hybrid.substrate.exit_codes import RunError

T = TypeVar("T")


class CheckpointError(RunError):
    """A checkpoint could not be written or is not sound; the message is the same on every rank."""


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the values of all ranks of ``group`` (None: all there are), by rank; collective. Values are pickled."""
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def failing_together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Make what the body raises on one rank be raised on every rank of ``group``; collective.

    Other ranks would otherwise wait for the failed one until their collective times out. Collectives in the body must be
    reached by all ranks.

    Raises:
        ValueError: the body raised on some rank, and wherever it raised it was a ValueError; the messages in rank order.
        CheckpointError: the same with any other error among them.
    """
    cause: BaseException | None = None
    try:
        yield
    # torch's CheckpointException is no Exception.
    except (Exception, CheckpointException) as error:
        cause = error
    failure = None if cause is None else (describe(cause), isinstance(cause, ValueError))
    failures = [each for each in gather(failure, group) if each is not None]
    if failures:
        message = "; ".join(dict.fromkeys(text for text, _ in failures))
        raise (ValueError if all(is_mistake for _, is_mistake in failures) else CheckpointError)(message) from cause


def describe(error: BaseException) -> str:
    """Put an error into one line; of torch's collection of all ranks' errors the first is taken."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, CheckpointError)) else f"{type(error).__name__}: {text}"
