"""The one check that all probes make of their labels."""

from __future__ import annotations

from torch import Tensor


def require_classes(classes: Tensor, num_classes: int) -> None:
    """Refuse class indices that are not among ``num_classes``.

    Args:
        classes: whole numbers in any shape.

    Raises:
        ValueError: see there.
    """
    if classes.numel() and not (0 <= int(classes.min()) and int(classes.max()) < num_classes):
        raise ValueError(f"expected classes from 0 to {num_classes - 1}, got {int(classes.min())} to {int(classes.max())}")
