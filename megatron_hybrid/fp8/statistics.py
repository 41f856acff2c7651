"""What the cast to float8 did to a tensor: how large it was, and the share of its elements that did not fit at either end."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.fp8.formats import Float8Format

_AMAX, _INVERSE_SCALE, _SATURATED, _FLUSHED, _ELEMENTS = range(5)
NUM_STATISTICS: Final = 5
"""Length of a statistics dimension S: amax and the largest inverse scale, then the numbers of saturated, flushed and of all elements."""
_MAXIMA, _COUNTS = slice(_AMAX, _SATURATED), slice(_SATURATED, NUM_STATISTICS)


def tensor_statistics(x: Tensor, x_8: Tensor, scale: Tensor, to: Float8Format) -> Tensor:
    """Describe a cast.

    Args:
        x: the tensor.
        x_8: what became of it.
        scale: what it was multiplied by.
        to: the format of ``x_8``.

    Returns:
        fp64 [S]. Saturated is what lay more than half a step beyond the format's largest number, flushed what was not zero and is.
    """
    magnitude = x.float().abs()
    saturated = (magnitude * scale > to.saturation_point).sum()
    flushed = ((magnitude > 0) & (x_8.float() == 0)).sum()
    num_elements = magnitude.new_tensor(x.numel(), dtype=torch.float64)
    return torch.stack([each.double() for each in (magnitude.amax(), scale.double().reciprocal(), saturated, flushed, num_elements)])


def merge_statistics(into_S: Tensor, other_S: Tensor) -> None:
    """Add one tensor's statistics to another's in place.

    Recomputation counts each of a linear's inputs and weights twice, which changes no share.
    """
    into_S[_MAXIMA] = torch.maximum(into_S[_MAXIMA], other_S[_MAXIMA])
    into_S[_COUNTS] += other_S[_COUNTS]


def reduce_statistics(statistics_NRS: Tensor, group: dist.ProcessGroup) -> None:
    """Merge the statistics of all ranks of ``group`` in place; collective."""
    for part, operation in ((_MAXIMA, dist.ReduceOp.MAX), (_COUNTS, dist.ReduceOp.SUM)):
        reduced = statistics_NRS[..., part].contiguous()
        dist.all_reduce(reduced, operation, group=group)
        statistics_NRS[..., part] = reduced


def describe_statistics(statistics_S: Tensor) -> dict[str, Any]:
    """Return amax (None where not finite), the smallest scale (None where nothing was cast) and shares as plain JSON."""
    amax, inverse_scale, saturated, flushed, elements = statistics_S.tolist()
    return {
        "amax": amax if math.isfinite(amax) else None,
        # Exact: an fp32 number comes back from its fp64 inverse.
        "scale": torch.tensor(1 / inverse_scale).item() if inverse_scale else None,
        "saturated": saturated / max(elements, 1),
        "flushed": flushed / max(elements, 1),
    }
