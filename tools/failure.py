"""How a tool ends: its work done, or one line that says why not, and the exit codes that every command has."""

from __future__ import annotations

import sys
from collections.abc import Callable

# megatron_hybrid.substrate.exit_codes has them too; it comes with torch, whose seconds a tool for files does without.
FINISHED, ERROR, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

EXIT_CODES = "exit code: 0 done, 1 failed (such as a full disk), 2 refused because an option or an input is wrong, 130 interrupted"
"""For the help."""

BAD_PATH = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""A file or folder that is not what the user takes it for: theirs to mend."""


def run_tool(work: Callable[[], int | None], if_interrupted: str) -> int:
    """Do a tool's work and return the exit code, the work's own if it returns one; what stopped it is printed in one line.

    A wrong value or path is the user's to mend, any other ``OSError`` is not. ``if_interrupted`` says what Ctrl-C leaves behind.
    """
    try:
        return work() or FINISHED
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, (ValueError, *BAD_PATH)) else ERROR
    except KeyboardInterrupt:
        print(f"interrupted: {if_interrupted}", file=sys.stderr)
        return INTERRUPTED
