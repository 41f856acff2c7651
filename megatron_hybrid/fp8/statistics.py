"""What the cast to float8 did to a tensor: how large it was, and the share of its elements that did not fit at either end."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.fp8.formats import Float8Format

_AMAX, _SATURATED, _FLUSHED, _ELEMENTS = range(4)
NUM_STATISTICS: Final = 4
"""Length of a statistics dimension S: amax, then the numbers of saturated, flushed and of all elements."""


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
    return torch.stack(
        [magnitude.amax().double(), saturated.double(), flushed.double(), magnitude.new_tensor(x.numel(), dtype=torch.float64)]
    )


def merge_statistics(into_S: Tensor, other_S: Tensor) -> None:
    """Add one tensor's statistics to another's in place.

    Recomputation counts each of a linear's inputs and weights twice, which changes no share.
    """
    into_S[_AMAX] = torch.maximum(into_S[_AMAX], other_S[_AMAX])
    into_S[_SATURATED:] += other_S[_SATURATED:]


def reduce_statistics(statistics_NRS: Tensor, group: dist.ProcessGroup) -> None:
    """Merge the statistics of all ranks of ``group`` in place; collective."""
    amax_NR, counts_NRC = statistics_NRS[..., _AMAX].contiguous(), statistics_NRS[..., _SATURATED:].contiguous()
    dist.all_reduce(amax_NR, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(counts_NRC, group=group)
    statistics_NRS[..., _AMAX], statistics_NRS[..., _SATURATED:] = amax_NR, counts_NRC


def describe_statistics(statistics_S: Tensor) -> dict[str, Any]:
    """Return amax (None where not finite) and shares as plain JSON."""
    amax, saturated, flushed, elements = statistics_S.tolist()
    return {"amax": amax if math.isfinite(amax) else None, "saturated": saturated / max(elements, 1), "flushed": flushed / max(elements, 1)}
