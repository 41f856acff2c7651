"""Warnings of megatron-core and torch that every run would print and that ask nothing of its user."""

from __future__ import annotations

import warnings

_MESSAGES = (
    # megatron-core without Transformer Engine: its torch fallbacks are what a CPU host is meant to use.
    r"Transformer Engine and Apex are not installed\. Falling back to .*",
)


def silence_known_warnings() -> None:
    """Hide exactly the messages above. Commands call this first, before megatron-core is imported."""
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
