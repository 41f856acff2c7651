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
    """SIGTERM or SIGUSR1 came; the run saved and can be continued by the same command."""
