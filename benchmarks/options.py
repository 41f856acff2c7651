"""Types of the benchmarks' options, so that a wrong value is argparse's one line and not a traceback after minutes."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def not_negative(text: str) -> int:
    """A whole number, 0 among them."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number not below 0, got {text!r}")
    return int(text)


def device(text: str) -> torch.device:
    """A device that torch has here."""
    try:
        found = torch.device(text)
        torch.empty(1, device=found)
    # An unknown name, a driver or a build that is not there.
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"torch cannot use {text!r} here: {str(error).splitlines()[0]}") from None
    return found


def picture(text: str) -> Path:
    """A file to be, in a folder that is there or is made."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {error.strerror}") from None
    return path
