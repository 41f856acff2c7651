"""Squared ReLU in Triton: `activation.squared_relu_reference`, forward and backward in one pass over memory each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hybrid.ops.triton.launch import check_tensors

BLOCK = 4096


@triton.jit
def squared_relu_forward_kernel(x_ptr, y_ptr, num_elements, BLOCK: tl.constexpr):
    i = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.maximum(tl.load(x_ptr + i, mask=i < num_elements, other=0.0).to(tl.float32), 0.0)
    tl.store(y_ptr + i, (x * x).to(y_ptr.dtype.element_ty), mask=i < num_elements)


@triton.jit
def squared_relu_backward_kernel(y_ptr, dy_ptr, dx_ptr, num_elements, BLOCK: tl.constexpr):
    i = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(y_ptr + i, mask=i < num_elements, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + i, mask=i < num_elements, other=0.0).to(tl.float32)
    tl.store(dx_ptr + i, (2.0 * tl.sqrt(y) * dy).to(dx_ptr.dtype.element_ty), mask=i < num_elements)


def squared_relu(x: Tensor) -> Tensor:
    """`squared_relu_reference` on a GPU, keeping only its own result, whose square root is max(x, 0).

    Raises ValueError: x is on a CPU or in a dtype the kernels do not take.
    """
    check_tensors(x=x)
    return _SquaredReLU.apply(x)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        squared_relu_forward_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK=BLOCK, num_warps=8)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(y)
        squared_relu_backward_kernel[(triton.cdiv(y.numel(), BLOCK),)](y, dy, dx, y.numel(), BLOCK=BLOCK, num_warps=8)
        return dx
