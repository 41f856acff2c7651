"""What a process does with memory that it has freed."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3
"""glibc's malloc.h."""


def map_large_blocks(threshold_bytes: int = 1 << 20) -> None:
    """From now on, give every block of at least this size a mapping of its own, which goes back to the operating system when it is freed.

    Left to itself, glibc raises that size to the largest block it has seen freed, up to 32 MiB. Activations of some MiB then come from a
    heap that shrinks from its end alone, and small objects that live on between them keep it with the process. A mapping costs page faults,
    so this is for a process whose peak counts more than its speed. Without glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, threshold_bytes)
