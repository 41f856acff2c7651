"""What this host has installed."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def has_transformer_engine() -> bool:
    """Whether Transformer Engine is there with its torch part, whose module can be found only once Transformer Engine has loaded it."""
    try:
        return bool(version("transformer_engine_torch"))
    except PackageNotFoundError:
        return False
