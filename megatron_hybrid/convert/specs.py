"""What a checkpoint has to hold, and whether it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

_NAMES_SHOWN = 3


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Weights of any other dtype, quantised ones for instance, are not converted."""


def check_specs(place: object, found: Mapping[str, TensorSpec], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the tensors of a checkpoint with what its configuration asks for.

    Args:
        place: the checkpoint, for the message.
        found: name -> what is there.
        expected: name -> shape.

    Raises:
        ValueError: tensors are missing, superfluous, of another shape, or of a dtype that is not converted; the message names them.
    """
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing {_shortened(missing)}")
    if extra := sorted(found.keys() - expected.keys()):
        problems.append(f"not part of the model: {_shortened(extra)}")
    both = [name for name in expected if name in found]
    shapes = [
        f"{name} is {list(found[name].shape)}, the configuration asks for {list(expected[name])}"
        for name in both
        if found[name].shape != expected[name]
    ]
    if shapes:
        problems.append(_shortened(shapes))
    dtypes = [f"{name} is {found[name].dtype}" for name in both if found[name].dtype not in DTYPES.values()]
    if dtypes:
        problems.append(f"{_shortened(dtypes)}; expected {', '.join(DTYPES)}")
    if problems:
        raise ValueError(f"{place} does not fit its configuration: {'; '.join(problems)}")


def _shortened(texts: list[str]) -> str:
    more = len(texts) - _NAMES_SHOWN
    return ", ".join(texts[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
