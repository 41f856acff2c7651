"""RMSNorm and the gated, grouped RMSNorm in Triton: `norm.rms_norm_reference` and `norm.gated_rms_norm_reference`.

With u = y silu(gate) (or u = x), r = 1 / rms(u) within a group and g = dout weight:

    out = u r weight        du = r (g - u r^2 mean(g u))        dweight = sum over rows of dout u r

One kernel pair serves both; the ungated norm is one group without a gate. The backward recomputes r from its own read of u, keeps dweight
of a run of rows in registers, and leaves the runs to be added up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hybrid.ops.norm import check_groups
from megatron_hybrid.ops.triton.launch import NormLaunch, check_tensors, norm_launch, with_dense_rows
from megatron_hybrid.ops.triton.row_sum import gradient_from_parts


@triton.jit(do_not_specialize=["num_rows", "inner_rows"])
def norm_forward_kernel(
    y_ptr,
    gate_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    inner_rows,
    y_stride_0,
    y_stride_1,
    gate_stride_0,
    gate_stride_1,
    out_stride_0,
    out_stride_1,
    eps,
    HAS_GATE: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of ROWS rows, groups of SIZE channels). Row r stands at (r / inner_rows, r % inner_rows)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outer, inner = (row // inner_rows).to(tl.int64)[:, None], (row % inner_rows).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK)
    channel = (tl.program_id(1) * SIZE + d)[None, :]
    mask = (row < num_rows)[:, None] & (d < SIZE)[None, :]
    u = tl.load(y_ptr + outer * y_stride_0 + inner * y_stride_1 + channel, mask=mask, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(gate_ptr + outer * gate_stride_0 + inner * gate_stride_1 + channel, mask=mask, other=0.0).to(tl.float32)
        u *= gate / (1.0 + tl.exp(-gate))
    weight = tl.load(weight_ptr + channel, mask=(d < SIZE)[None, :], other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(u * u, axis=1) / SIZE + eps)
    out = u * r[:, None] * weight
    tl.store(out_ptr + outer * out_stride_0 + inner * out_stride_1 + channel, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "inner_rows"])
def norm_backward_kernel(
    y_ptr,
    gate_ptr,
    weight_ptr,
    dout_ptr,
    dy_ptr,
    dgate_ptr,
    dweight_ptr,
    num_rows,
    inner_rows,
    y_stride_0,
    y_stride_1,
    gate_stride_0,
    gate_stride_1,
    dout_stride_0,
    dout_stride_1,
    dy_stride_0,
    dy_stride_1,
    dgate_stride_0,
    dgate_stride_1,
    eps,
    HAS_GATE: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (runs of NUM_TILES ROWS rows, groups). dweight is [runs, groups SIZE] fp32."""
    d = tl.arange(0, BLOCK)
    channel = (tl.program_id(1) * SIZE + d)[None, :]
    is_channel = (d < SIZE)[None, :]
    weight = tl.load(weight_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in range(NUM_TILES):
        row = (tl.program_id(0) * NUM_TILES + tile) * ROWS + tl.arange(0, ROWS)
        outer, inner = (row // inner_rows).to(tl.int64)[:, None], (row % inner_rows).to(tl.int64)[:, None]
        mask = (row < num_rows)[:, None] & is_channel
        y = tl.load(y_ptr + outer * y_stride_0 + inner * y_stride_1 + channel, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + outer * dout_stride_0 + inner * dout_stride_1 + channel, mask=mask, other=0.0).to(tl.float32)
        if HAS_GATE:
            gate = tl.load(gate_ptr + outer * gate_stride_0 + inner * gate_stride_1 + channel, mask=mask, other=0.0).to(tl.float32)
            sigmoid = 1.0 / (1.0 + tl.exp(-gate))
            u = y * gate * sigmoid
        else:
            u = y
        r = tl.rsqrt(tl.sum(u * u, axis=1) / SIZE + eps)[:, None]
        normalised = u * r
        dweight += dout * normalised
        dout *= weight
        du = r * (dout - normalised * (tl.sum(dout * normalised, axis=1) / SIZE)[:, None])
        dy_offset = outer * dy_stride_0 + inner * dy_stride_1 + channel
        if HAS_GATE:
            tl.store(dy_ptr + dy_offset, (du * gate * sigmoid).to(dy_ptr.dtype.element_ty), mask=mask)
            dgate = du * y * sigmoid * (1.0 + gate * (1.0 - sigmoid))
            dgate_offset = outer * dgate_stride_0 + inner * dgate_stride_1 + channel
            tl.store(dgate_ptr + dgate_offset, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(dy_ptr + dy_offset, du.to(dy_ptr.dtype.element_ty), mask=mask)
    dweight_offset = tl.cast(tl.program_id(0), tl.int64) * tl.num_programs(1) * SIZE + tl.program_id(1) * SIZE + d
    tl.store(dweight_ptr + dweight_offset, tl.sum(dweight, axis=0), mask=d < SIZE)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`rms_norm_reference` on a GPU; keeps its input alone. Raises ValueError: a CPU tensor, or a dtype the kernels do not take."""
    check_tensors(x=x)
    return _RMSNorm.apply(x, weight_D, eps)


def gated_rms_norm(y: Tensor, gate: Tensor, weight_D: Tensor, num_groups: int, eps: float) -> Tensor:
    """`gated_rms_norm_reference` on a GPU; keeps y and gate alone, which are read in any strides.

    Raises ValueError: the groups do not divide the channels, a CPU tensor, or a dtype the kernels do not take.
    """
    check_groups(y.shape[-1], num_groups)
    check_tensors(y=y, gate=gate)
    return _GatedRMSNorm.apply(y, gate, weight_D, num_groups, eps)


def norm_forward(
    y: Tensor, gate: Tensor | None, weight_D: Tensor, num_groups: int, eps: float, out: Tensor, launch: NormLaunch | None = None
) -> None:
    """Write the norm of y [..., D], gated if there is a gate, to `out`; any strides with dense channels."""
    y, out, gate = as_rows(y), as_rows(out), None if gate is None else as_rows(gate)
    num_rows, size = y.shape[0] * y.shape[1], y.shape[2] // num_groups
    launch = norm_launch(size) if launch is None else launch
    norm_forward_kernel[(triton.cdiv(num_rows, launch.rows), num_groups)](
        y,
        gate,
        weight_D,
        out,
        num_rows,
        y.shape[1],
        *y.stride()[:2],
        *(y if gate is None else gate).stride()[:2],
        *out.stride()[:2],
        eps,
        HAS_GATE=gate is not None,
        SIZE=size,
        ROWS=launch.rows,
        BLOCK=triton.next_power_of_2(size),
        num_warps=launch.num_warps,
    )


def norm_backward(
    y: Tensor,
    gate: Tensor | None,
    weight_D: Tensor,
    num_groups: int,
    eps: float,
    dout: Tensor,
    dy: Tensor,
    dgate: Tensor | None,
    launch: NormLaunch | None = None,
) -> Tensor:
    """Write dy, and dgate if there is a gate; return the weight's gradient in parts [X, 1, D] fp32."""
    y, dout, dy = as_rows(y), as_rows(dout), as_rows(dy)
    gate, dgate = (None, None) if gate is None else (as_rows(gate), as_rows(dgate))
    num_rows, size = y.shape[0] * y.shape[1], y.shape[2] // num_groups
    launch = norm_launch(size) if launch is None else launch
    num_runs = triton.cdiv(num_rows, launch.rows * launch.num_tiles)
    dweight_XD = torch.empty(num_runs, y.shape[2], dtype=torch.float32, device=y.device)
    norm_backward_kernel[(num_runs, num_groups)](
        y,
        gate,
        weight_D,
        dout,
        dy,
        dgate,
        dweight_XD,
        num_rows,
        y.shape[1],
        *y.stride()[:2],
        *(y if gate is None else gate).stride()[:2],
        *dout.stride()[:2],
        *dy.stride()[:2],
        *(dy if dgate is None else dgate).stride()[:2],
        eps,
        HAS_GATE=gate is not None,
        SIZE=size,
        ROWS=launch.rows,
        NUM_TILES=launch.num_tiles,
        BLOCK=triton.next_power_of_2(size),
        num_warps=launch.num_warps,
    )
    return dweight_XD.unsqueeze(1)


def as_rows(x: Tensor) -> Tensor:
    """x as [outer, inner, D], a view of tensors with up to three axes; more axes are merged and must lie together in memory."""
    return x.reshape(1, 1, -1) if x.dim() == 1 else x.unsqueeze(0) if x.dim() == 2 else x if x.dim() == 3 else x.view(1, -1, x.shape[-1])


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = _rows_of_any_shape(x)
        out = torch.empty_like(x)
        norm_forward(x, None, weight_D, 1, eps, out)
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D = ctx.saved_tensors
        dx = torch.empty_like(x)
        dweight_X1D = norm_backward(x, None, weight_D, 1, ctx.eps, _rows_of_any_shape(dout), dx, None)
        return dx, gradient_from_parts(weight_D, dweight_X1D), None


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, gate: Tensor, weight_D: Tensor, num_groups: int, eps: float) -> Tensor:
        y, gate = _rows_of_any_shape(y), _rows_of_any_shape(gate)
        out = torch.empty_like(y)
        norm_forward(y, gate, weight_D, num_groups, eps, out)
        ctx.save_for_backward(y, gate, weight_D)
        ctx.num_groups, ctx.eps = num_groups, eps
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        y, gate, weight_D = ctx.saved_tensors
        dy, dgate = torch.empty_like(y), torch.empty_like(gate)
        dweight_X1D = norm_backward(y, gate, weight_D, ctx.num_groups, ctx.eps, _rows_of_any_shape(dout), dy, dgate)
        return dy, dgate, gradient_from_parts(weight_D, dweight_X1D), None, None


def _rows_of_any_shape(x: Tensor) -> Tensor:
    return with_dense_rows(x) if x.dim() <= 3 else x.contiguous()
