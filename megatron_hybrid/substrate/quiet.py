"""Warnings of megatron-core and torch that every run would print and that ask nothing of its user."""

from __future__ import annotations

import warnings

_MESSAGES = (
    # megatron-core without Transformer Engine: its torch fallbacks are what a CPU host is meant to use.
    r"Transformer Engine and Apex are not installed\. Falling back to .*",
    # Names that megatron-core 0.16.1 calls and torch 2.13 has newer ones for.
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated.*",
)


def silence_known_warnings() -> None:
    """Hide exactly the messages above. Commands call this first, before megatron-core is imported."""
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
