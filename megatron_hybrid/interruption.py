"""Ctrl-C where a program is still importing or loading.

Python raises KeyboardInterrupt wherever it happens to be. In an import that is a traceback of fifty lines, or nothing at all: callbacks of
the import system swallow it, and torch's checkpoint reader takes it for an error of its own. So until there is something to put in order,
a signal ends the process where it stands. Nothing here needs torch, whose import is the longest of them.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def leave_at_once_on(*numbers: signal.Signals) -> None:
    """Let these signals end the process, with one line and 128 + their number. A signal that is ignored (nohup) stays so."""
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave)


def raise_on_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, as Python has it; one that is ignored stays so."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    # Of several ranks the first speaks.
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        os.write(2, b"interrupted\n")
    os._exit(128 + number)
