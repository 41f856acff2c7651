"""Selective recomputation: what stands between a block's two linears is thrown away and made again in backward."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from torch import Tensor


def recompute_between(core: Callable[[Tensor], Tensor], out: Callable[[Tensor], Tensor], projected: Tensor) -> Tensor:
    """``out(core(projected))``, keeping ``projected`` alone: neither what ``core`` saves for backward nor its output stays in memory.

    The output is made again when the gradient of ``out`` arrives, which is before ``out`` reads its input for the weight's gradient.
    """
    checkpoint = CheckpointWithoutOutput(fp8=None)
    result = out(checkpoint.checkpoint(core, projected))
    checkpoint.discard_output_and_register_recompute(result)
    return result
