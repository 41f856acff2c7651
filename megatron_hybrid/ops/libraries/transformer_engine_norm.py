"""RMSNorm by Transformer Engine's kernels: `norm.rms_norm_reference`."""

from __future__ import annotations

import torch
import transformer_engine.pytorch  # noqa: F401  # loads the library that the extension below needs
from torch import Tensor
from transformer_engine.pytorch.constants import TE_DType
from transformer_engine_torch import rmsnorm_bwd, rmsnorm_fwd

_RESERVED_PROCESSORS, _ADDS_ONE_TO_WEIGHT = 0, False


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`rms_norm_reference` on a GPU; the weight is read in the dtype of x. Keeps its input and one number per row."""
    return _RMSNorm.apply(x, weight_D.to(x.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_ND = x.contiguous().view(-1, x.shape[-1])
        y_ND, _, reciprocal_rms_N = rmsnorm_fwd(
            x_ND, weight_D, eps, None, None, TE_DType[x.dtype], _RESERVED_PROCESSORS, _ADDS_ONE_TO_WEIGHT
        )
        ctx.save_for_backward(x_ND, weight_D, reciprocal_rms_N)
        return y_ND.view(x.shape)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight_D, reciprocal_rms_N = ctx.saved_tensors
        dy_ND = dy.contiguous().view(x_ND.shape)
        dx_ND, dweight_D = rmsnorm_bwd(dy_ND, x_ND, reciprocal_rms_N, weight_D, _RESERVED_PROCESSORS, _ADDS_ONE_TO_WEIGHT)
        return dx_ND.view(dy.shape), dweight_D, None
