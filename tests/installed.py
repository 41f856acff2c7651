"""What a host has installed, for tests of other libraries' kernels."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def is_installed(distribution: str) -> bool:
    """Whether a distribution of this name is installed; a module of its may be found only once another has been imported."""
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False
