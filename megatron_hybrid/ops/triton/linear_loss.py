"""The shell of a loss that is fused with the output layer, on a GPU: a chunk of tokens' logits at a time (bf16), turned into their own
gradient in place by the loss's kernels; then dhidden = dlogits W, and dW is added to the weight's fp32 buffer by the product.

The logits of all tokens never exist, and nothing is recomputed in backward. What the loss is says a ``ChunkLoss``: ``cross_entropy`` and
``distillation`` have one each.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_hybrid.ops.main_grad import add_product, has_main_grad, mark_added


class ChunkLoss(Protocol):
    """What a loss makes of a chunk of logits."""

    def __call__(self, rows: slice, logits_NV: Tensor, weights_N: Tensor | None) -> Tensor:
        """Return each token's loss [N], fp32, whole on every rank.

        Args:
            rows: which tokens of all they are.
            logits_NV: this rank's, padding of the vocabulary included; overwritten with weights x gradient, zero over the padding.
            weights_N: fp32 weights of the tokens; None where no gradient is wanted, and then the logits stay.
        """


def chunked_linear_loss(
    hidden: Tensor, weight_VD: Tensor, token_weights: Tensor, chunk_loss: ChunkLoss, *, num_rows_per_chunk: int
) -> tuple[Tensor, Tensor]:
    """Return ``sum(token_weights * losses)`` and the unweighted losses, which carry no gradient; both fp32.

    hidden [..., D], token_weights [...]. Gradients go to hidden and weight_VD; where ranks share the vocabulary, that of hidden is this
    rank's summand. Where the weight has a ``main_grad``, its gradient is added there in the forward pass, and the returned sum must be what
    the backward pass starts from, unscaled; anything else fails.
    """
    wants_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight_VD.requires_grad)
    return _ChunkedLinearLoss.apply(hidden, weight_VD, token_weights, chunk_loss, num_rows_per_chunk, wants_gradients)


class _ChunkedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight_VD: Tensor,
        token_weights: Tensor,
        chunk_loss: ChunkLoss,
        num_rows_per_chunk: int,
        wants_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        hidden_ND, weights_N = hidden.reshape(-1, hidden.shape[-1]), token_weights.reshape(-1).float()
        losses_N = torch.empty(weights_N.shape, dtype=torch.float32, device=hidden.device)
        dhidden_ND = torch.empty_like(hidden_ND) if wants_gradients else None
        into_main_grad = wants_gradients and has_main_grad(weight_VD)
        dweight_VD = None
        if wants_gradients and not into_main_grad:
            dweight_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
        for start in range(0, weights_N.shape[0], num_rows_per_chunk):
            rows = slice(start, start + num_rows_per_chunk)
            logits_NV = hidden_ND[rows] @ weight_VD.t()
            losses_N[rows] = chunk_loss(rows, logits_NV, weights_N[rows] if wants_gradients else None)
            if not wants_gradients:
                continue
            torch.mm(logits_NV, weight_VD, out=dhidden_ND[rows])
            if into_main_grad:
                add_product(weight_VD, logits_NV, hidden_ND[rows])
            else:
                dweight_VD += logits_NV.t() @ hidden_ND[rows]
        ctx.into_main_grad = into_main_grad
        if wants_gradients:
            ctx.save_for_backward(dhidden_ND.view(hidden.shape), weight_VD if into_main_grad else dweight_VD.to(weight_VD.dtype))
        losses = losses_N.view(token_weights.shape)
        ctx.mark_non_differentiable(losses)
        return (losses_N * weights_N).sum(), losses

    @staticmethod
    def backward(ctx, dsum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, weight_or_gradient = ctx.saved_tensors
        if ctx.into_main_grad:
            # main_grad took the weight's gradient in forward, when this factor was not known yet.
            torch._assert_async(dsum == 1, "the loss sum must enter the backward pass with gradient 1")
            return dhidden, mark_added(weight_or_gradient), *(None,) * 4
        return (dhidden * dsum).to(dhidden.dtype), (weight_or_gradient * dsum).to(dhidden.dtype), *(None,) * 4
