"""What this host has installed."""

from __future__ import annotations

from functools import cache


@cache
def has_transformer_engine() -> bool:
    """Whether Transformer Engine is there and loads with its torch part; asked of the module, because builds name their packages as they
    like."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError):
        return False
    return True
