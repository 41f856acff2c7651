"""What this host has installed."""

from __future__ import annotations

import importlib
from functools import cache

SUPPORTED_TRANSFORMER_ENGINE = "2.11"
"""Major and minor version whose functions `ops/libraries` and the float8 product call; megatron-core 0.16.1 asks for less than 2.12."""


@cache
def has_transformer_engine() -> bool:
    """Whether Transformer Engine is there and loads with its torch part; asked of the module, because builds name their packages as they
    like."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def transformer_engine_obstacle() -> str | None:
    """Why its kernels cannot be had here, in words that follow the option which asks for them; None where they can.

    A build that does not say its version is taken for the supported one.
    """
    install = f'install it by pip install --no-build-isolation "transformer-engine[pytorch]=={SUPPORTED_TRANSFORMER_ENGINE}.0"'
    if not has_transformer_engine():
        return f"needs transformer-engine with its torch part, which is not installed; {install}"
    version = getattr(importlib.import_module("transformer_engine"), "__version__", SUPPORTED_TRANSFORMER_ENGINE)
    if ".".join(version.split(".")[:2]) != SUPPORTED_TRANSFORMER_ENGINE:
        return f"needs transformer-engine {SUPPORTED_TRANSFORMER_ENGINE}, and {version} is installed; {install}"
    return None
