"""DAMP (Trinh et al. 2024): multiplicative Gaussian noise on weights, W (1 + e) with e of standard deviation ``std``, while training.

One draw per weight and optimizer step, for all ranks and micro-batches, so that no layout changes it. Each rank draws the whole weight's
noise and keeps its part, which costs tensor ranks some time and buys the same noise in every cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hybrid.data.hashing import key64


class DampNoise:
    """The noise of one weight, by its name in the whole model."""

    def __init__(self, name: str, std: float, seed: int, *, axis: int, tensor_rank: int, tensor_ranks: int) -> None:
        self.name, self.std, self.seed = name, std, seed
        self.axis, self.tensor_rank, self.tensor_ranks = axis, tensor_rank, tensor_ranks

    def __call__(self, weight_OI: Tensor, step: int) -> Tensor:
        """The weight with the step's noise, in its dtype."""
        shape = list(weight_OI.shape)
        shape[self.axis] *= self.tensor_ranks
        generator = torch.Generator(weight_OI.device).manual_seed(key64(self.seed, "damp", self.name, step) >> 1)
        noise = torch.randn(shape, generator=generator, device=weight_OI.device, dtype=torch.float32)
        own = noise.chunk(self.tensor_ranks, self.axis)[self.tensor_rank]
        return (weight_OI * (1 + self.std * own)).to(weight_OI.dtype)
