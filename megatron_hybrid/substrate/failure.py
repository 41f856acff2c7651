"""When one rank fails, all of them leave at once, and one of them says why.

The ranks share a board in the store they met at. The first to fail puts its exit code there and prints its error; a thread of
every other rank sees that within half a second and ends the process with the same code, whatever it was doing. Collectives
alone do not give this: NCCL waits for its timeout, and each gloo rank would print its own broken connection.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial

import torch.distributed as dist

from megatron_hybrid.substrate.exit_codes import ExitCode, RunError

_POLL_S = 0.5
_PRECEDENCE_S = 2.0
_LEAVING_S = 5.0
_KEY = "failure/exit_code"
_BAD_PATH = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class FailureBoard:
    """The board of one run. ``store`` must be a connection of its own: its calls wait for each other."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failure-board", daemon=True)

    def start_watching(self) -> None:
        """Leave as soon as another rank fails."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching; the run is over."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def claim(self, exit_code: int) -> bool:
        """Announce a failure; return whether it is the first one, whose error is the one to print."""
        self.close()
        try:
            first = self._store.add("failure/claims", 1) == 1
            if first:
                self._store.set(_KEY, str(exit_code))
            return first
        except (dist.DistError, RuntimeError):
            # The store went away with the process that served it: print, rather than leave without a word.
            return True

    def wait_for_others(self, num_others: int) -> None:
        """Keep serving the store until the other ranks have seen the failure, or have had the time to."""
        deadline = time.monotonic() + _LEAVING_S
        while self._store.add("failure/left", 0) < num_others and time.monotonic() < deadline:
            time.sleep(_POLL_S / 5)

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_S):
            try:
                if self._store.check([_KEY]):
                    exit_code = int(self._store.get(_KEY))
                    self._store.add("failure/left", 1)
                    if not self._stop.is_set():
                        leave(exit_code)
            except (dist.DistError, RuntimeError):
                return


def describe_failure(error: BaseException, entry: Callable[..., object]) -> tuple[int, str]:
    """Return the exit code and the text for an error that ended a run.

    A ``ValueError`` that our own code (or the package of ``entry``) raised is the user's to mend, and its message says how; so is a path
    that is missing or closed to them. Anything else comes with its traceback.
    """
    if isinstance(error, KeyboardInterrupt):
        return 128 + 2, "interrupted"
    if isinstance(error, _BAD_PATH) or (isinstance(error, ValueError) and _raised_by(error, entry)):
        return ExitCode.BAD_INPUT, f"error: {error}"
    if isinstance(error, OSError | RunError):
        return ExitCode.ERROR, f"error: {error}"
    return ExitCode.ERROR, "".join(traceback.format_exception(error)).rstrip()


def let_first_failure_speak(error: BaseException) -> None:
    """Wait a little if ``error`` is only what other ranks notice when one of them dies."""
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))):
        time.sleep(_PRECEDENCE_S)


def leave(exit_code: int) -> None:
    """End this process now: after a failure, destructors of process groups and waiting threads could only hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _raised_by(error: BaseException, entry: Callable[..., object]) -> bool:
    while isinstance(entry, partial):
        entry = entry.func
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    ours = {name.partition(".")[0] for name in (__name__, entry.__module__)}
    return frame is not None and frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] in ours
