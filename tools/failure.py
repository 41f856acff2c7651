"""How a tool ends that cannot do what it was asked: one line, and the exit codes that every command has."""

from __future__ import annotations

import sys

# megatron_hybrid.substrate.exit_codes has them too; it comes with torch, whose seconds a tool for files does without.
ERROR, BAD_INPUT = 1, 2

EXIT_CODES = "exit code: 0 done, 1 failed (such as a full disk), 2 refused because an option or an input is wrong"
"""For the help."""


def report_failure(error: ValueError | OSError) -> int:
    """Print the error and return the exit code: a wrong value or a missing file is the user's to mend, anything else is not."""
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT if isinstance(error, ValueError | FileNotFoundError) else ERROR
