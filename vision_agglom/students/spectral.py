"""Spectral reparametrization of a linear's weight (Zhai et al. 2023, "sigma-Reparam"; RADIO's variant with softplus and an offset).

    effective weight = W (softplus(s) + 0.05) / sigma(W)

sigma is the largest singular value, estimated by power iteration; s is learned, one number per chunk (q, k and v, or gate and value,
have their own). Under tensor parallelism sigma is that of the whole matrix: products over the cut dimension are summed over the ranks, and
so are the gradients of s and of sigma, which each rank's shard of W sees only in part.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from megatron_hybrid.layers.parameters import declare, ones

OFFSET = 0.05
"""Smallest factor: softplus cannot take a weight to zero."""
_EPS = 1e-6


class SpectralScale(torch.nn.Module):
    """sigma and s of one weight.

    The singular vectors are whole on every tensor rank, so that checkpoints do not depend on the cut. They move once per optimizer step
    (``update``), not per forward pass: recomputation and the number of micro-batches change nothing.

    Args:
        shape: [rows, columns] of the whole weight.
        axis: the dimension cut over the tensor ranks.
        chunks: interleaved chunks along the rows, each with a sigma of its own. Row r belongs to chunk (r // run) % chunks.
        run: consecutive rows of one chunk, head_dim for q, k, v.
    """

    def __init__(self, shape: tuple[int, int], *, axis: int, chunks: int, run: int, config: TransformerConfig, group: ProcessGroup) -> None:
        super().__init__()
        self.axis, self.chunks, self.run, self.group = axis, chunks, run, group
        # Two-dimensional, so that weight decay applies.
        self.scale = torch.nn.Parameter(torch.empty(chunks, 1, dtype=config.params_dtype))
        declare(self.scale, initializer=ones)
        left, right = torch.ones(chunks, shape[0] // chunks), torch.ones(chunks, shape[1])
        self.register_buffer("left_KO", left / math.sqrt(left.shape[1]))
        self.register_buffer("right_KI", right / math.sqrt(right.shape[1]))

    def forward(self, weight_OI: Tensor) -> Tensor:
        """The effective weight of this rank's shard, in the weight's dtype."""
        sigma_K1 = copy_to_tensor_model_parallel_region(self._sigma(weight_OI), group=self.group)[:, None]
        scale_K1 = copy_to_tensor_model_parallel_region(self.scale, group=self.group)
        factor_K1 = (F.softplus(scale_K1.float()) + OFFSET) / (sigma_K1 + _EPS)
        return self._scale_rows(weight_OI, factor_K1).to(weight_OI.dtype)

    @torch.no_grad()
    def update(self, weight_OI: Tensor, iterations: int = 1) -> None:
        """Power iteration: right <- W^T left, left <- W right, both normalised. Collective over the tensor ranks."""
        weight_KOI = self._chunk(weight_OI).float()
        for _ in range(iterations):
            right_KI = torch.einsum("koi,ko->ki", weight_KOI, self._own(self.left_KO, 0))
            self.right_KI.copy_(F.normalize(self._complete(right_KI, 1), dim=1))
            left_KO = torch.einsum("koi,ki->ko", weight_KOI, self._own(self.right_KI, 1))
            self.left_KO.copy_(F.normalize(self._complete(left_KO, 0), dim=1))

    @torch.no_grad()
    def start_at_identity(self, weight_OI: Tensor, iterations: int = 20) -> None:
        """Set s so that the effective weight is the weight itself."""
        self.update(weight_OI, iterations)
        target_K1 = (self._sigma(weight_OI)[:, None] + _EPS - OFFSET).clamp(min=1e-4)
        # The inverse of softplus.
        self.scale.copy_(target_K1 + torch.log(-torch.expm1(-target_K1)))

    def _sigma(self, weight_OI: Tensor) -> Tensor:
        partial_K = torch.einsum("ko,koi,ki->k", self._own(self.left_KO, 0), self._chunk(weight_OI).float(), self._own(self.right_KI, 1))
        return reduce_from_tensor_model_parallel_region(partial_K, group=self.group)

    def _chunk(self, weight_OI: Tensor) -> Tensor:
        """[rows, columns] as [chunks, rows / chunks, columns]."""
        return weight_OI.unflatten(0, (-1, self.chunks, self.run)).transpose(0, 1).flatten(1, 2)

    def _scale_rows(self, weight_OI: Tensor, factor_K1: Tensor) -> Tensor:
        return (weight_OI.float().unflatten(0, (-1, self.chunks, self.run)) * factor_K1[None, :, :, None]).flatten(0, 2)

    def _own(self, vector_KN: Tensor, axis: int) -> Tensor:
        """This rank's part of a singular vector that runs along ``axis`` of the weight."""
        return vector_KN.chunk(self.group.size(), 1)[self.group.rank()] if axis == self.axis else vector_KN

    def _complete(self, vector_KN: Tensor, axis: int) -> Tensor:
        """A product's vector along ``axis``, whole: put together from parts along the cut, summed along the other dimension."""
        if self.group.size() == 1:
            return vector_KN
        if axis == self.axis:
            parts = [torch.empty_like(vector_KN) for _ in range(self.group.size())]
            distributed.all_gather(parts, vector_KN.contiguous(), group=self.group)
            return torch.cat(parts, 1)
        distributed.all_reduce(vector_KN, group=self.group)
        return vector_KN
