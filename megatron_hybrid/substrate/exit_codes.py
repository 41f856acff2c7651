"""What a process says when it ends."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit codes of every command, the same on each rank. A process that a signal ends otherwise gives 128 + its number."""

    FINISHED = 0
    """The work is done."""
    ERROR = 1
    """Something failed; the one message is on stderr."""
    BAD_INPUT = 2
    """The options, the layout or the input files are wrong; nothing was started."""
    STOPPED = 85
    """SIGTERM or SIGUSR1 came, or train.exit_after_steps was reached; the run saved and the same command continues it."""


class RunError(RuntimeError):
    """A run that began cannot go on, and the message alone says why: it is printed without a traceback, with exit code 1."""
