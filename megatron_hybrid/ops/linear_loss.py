"""The shell of a loss that is fused with the output layer, on any host: the logits of a few tokens at a time, and both gradients formed
while they are there, so that neither the logits of all tokens nor a second product for them is ever needed.

What the loss is says a ``ChunkLoss``: ``cross_entropy`` and ``distillation`` have one each.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_hybrid.ops.linear import matmul_nt, weight_gradient


class ChunkLoss(Protocol):
    """What a loss makes of a chunk of logits."""

    def __call__(self, rows: slice, logits_NV: Tensor, weights_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return each token's loss, whole on every rank, and its gradient.

        Args:
            rows: which tokens of all they are.
            logits_NV: this rank's, of real words alone (V may be 0), in fp32 or fp64 and times ``scale``; may be overwritten.
            weights_N: weights of the tokens; None where no gradient is wanted.

        Returns:
            losses [N], and weights x gradient [N, V] with respect to the logits before they were scaled; None without weights.
        """


def scaled_logits(hidden_ND: Tensor, weight_VD: Tensor, scale: float) -> Tensor:
    """``scale * hidden @ weight.T`` in fp32 (fp64 for fp64), which a shard without words has none of: [N, V], V may be 0."""
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    if not weight_VD.shape[0]:
        return hidden_ND.new_zeros(hidden_ND.shape[0], 0, dtype=wide)
    return matmul_nt(hidden_ND, weight_VD).to(wide).mul_(scale)


def chunked_linear_loss(
    hidden: Tensor,
    weight_VD: Tensor,
    token_weights: Tensor,
    chunk_loss: ChunkLoss,
    *,
    num_valid: int,
    scale: float,
    num_rows_per_chunk: int,
) -> tuple[Tensor, Tensor]:
    """Return ``sum(token_weights * losses)`` and the unweighted losses, which carry no gradient; fp32 (fp64 for fp64).

    hidden [..., D], token_weights [...]; the first ``num_valid`` rows of ``weight_VD`` are real words. Gradients go to hidden and
    weight_VD; where ranks share the vocabulary, that of hidden is this rank's summand.
    """
    wants_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight_VD.requires_grad)
    return _ChunkedLinearLoss.apply(hidden, weight_VD, token_weights, chunk_loss, num_valid, scale, num_rows_per_chunk, wants_gradients)


class _ChunkedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight_VD: Tensor,
        token_weights: Tensor,
        chunk_loss: ChunkLoss,
        num_valid: int,
        scale: float,
        num_rows_per_chunk: int,
        wants_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        hidden_ND, weights_N = hidden.reshape(-1, hidden.shape[-1]), token_weights.reshape(-1).to(wide)
        valid_VD = weight_VD[:num_valid]
        losses_N = torch.empty(weights_N.shape, dtype=wide, device=hidden.device)
        dhidden_ND = torch.zeros_like(hidden_ND) if wants_gradients else None
        dweight_VD = torch.zeros(weight_VD.shape, dtype=wide, device=hidden.device) if wants_gradients else None
        for start in range(0, weights_N.shape[0], num_rows_per_chunk):
            rows = slice(start, start + num_rows_per_chunk)
            logits = scaled_logits(hidden_ND[rows], valid_VD, scale)
            losses_N[rows], gradient = chunk_loss(rows, logits, weights_N[rows] if wants_gradients and num_valid else None)
            if gradient is not None:
                gradient = gradient.to(hidden.dtype)
                dhidden_ND[rows] = matmul_nt(gradient, valid_VD.t())
                dweight_VD[:num_valid] += weight_gradient(gradient, hidden_ND[rows])
        if wants_gradients:
            ctx.save_for_backward(dhidden_ND.view(hidden.shape), dweight_VD.to(weight_VD.dtype))
        losses = losses_N.view(token_weights.shape)
        ctx.mark_non_differentiable(losses)
        return (losses_N * weights_N).sum(), losses

    @staticmethod
    def backward(ctx, dsum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight_VD = ctx.saved_tensors
        return (dhidden * dsum).to(dhidden.dtype), (dweight_VD * dsum).to(dweight_VD.dtype), *(None,) * 6
