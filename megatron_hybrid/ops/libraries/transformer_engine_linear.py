"""The linear by Transformer Engine's GEMM, which is cuBLASLt and can add to its result (``ops/main_grad.py``)."""

from __future__ import annotations

import torch
import transformer_engine.pytorch  # noqa: F401  # loads the library that the extension below needs
from torch import Tensor
from transformer_engine.pytorch.cpp_extensions.gemm import general_gemm

from megatron_hybrid.ops.main_grad import has_main_grad, mark_added


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`linear_reference` on a GPU in 16 bits; where the weight has a ``main_grad``, its gradient is added there in fp32 by the product."""
    return _Linear.apply(x, weight_OI)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_OI: Tensor) -> Tensor:
        x_MI = x.reshape(-1, x.shape[-1]).contiguous()
        ctx.save_for_backward(x_MI, weight_OI)
        return _product(weight_OI, x_MI, "TN").view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_MI, weight_OI = ctx.saved_tensors
        dy_MO = dy.reshape(-1, dy.shape[-1]).contiguous()
        dx = _product(weight_OI, dy_MO, "NN").view(*dy.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        if not has_main_grad(weight_OI):
            return dx, _product(x_MI, dy_MO, "NT")
        _product(x_MI, dy_MO, "NT", add_to=weight_OI.main_grad)
        return dx, mark_added(weight_OI)


def _product(a: Tensor, b: Tensor, layout: str, add_to: Tensor | None = None) -> Tensor:
    """The row-major matrix that cuBLAS calls ``op(a) op(b)`` in columns: TN is b @ a.T, NN is b @ a, NT is b.T @ a."""
    out_dtype = b.dtype if add_to is None else add_to.dtype
    product, *_ = general_gemm(a, b, out_dtype=out_dtype, layout=layout, out=add_to, accumulate=add_to is not None)
    return product
