"""The Mamba-2 core in Triton, `mamba_core.mamba_core_reference` as one autograd function.

Forward runs convolution, scan and norm kernels on views of the projection. For backward it keeps the projection and y of the scan; the
convolution is run again. Each backward kernel writes its part of one gradient: the norm dz, the scan d dt and, into a
buffer that the convolution's backward reads in place, the gradients of x, B and C; the convolution the rest. Nothing is concatenated or
copied.

Keeping y costs L B I elements (134 MB a layer for 8,192 tokens of the 8B in bf16) and saves a walk and the chunk outputs in backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_hybrid.ops.mamba_core import projection_sizes
from megatron_hybrid.ops.norm import check_groups
from megatron_hybrid.ops.segments import number_documents
from megatron_hybrid.ops.ssd import check_heads
from megatron_hybrid.ops.triton.conv1d import conv_backward, conv_forward
from megatron_hybrid.ops.triton.launch import ScanLaunch, check_tensors, with_dense_rows
from megatron_hybrid.ops.triton.norm import norm_backward, norm_forward
from megatron_hybrid.ops.triton.row_sum import gradient_from_parts
from megatron_hybrid.ops.triton.ssd import ScanGradients, choose_launch, scan_backward, scan_forward
from megatron_hybrid.ops.triton.ssd_steps import Scan


def mamba_core(
    zxBCdt_LBE: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    A_log_H: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_I: Tensor,
    *,
    num_groups: int,
    eps: float,
    segment_ids_BL: Tensor | None = None,
    chunk_length: int | None = None,
) -> Tensor:
    """`mamba_core_reference` on a GPU; `chunk_length` as `ssd` takes it.

    Raises ValueError: the sizes do not add up, the groups divide neither heads nor channels, a CPU tensor, or a dtype, chunk length or
    state that the kernels do not take.
    """
    num_heads, inner = A_log_H.shape[0], norm_weight_I.shape[0]
    check_heads(num_heads, num_groups)
    check_groups(inner, num_groups)
    check_tensors(zxBCdt_LBE=zxBCdt_LBE, conv_weight_CW=conv_weight_CW)
    sizes, conv_sizes = projection_sizes(zxBCdt_LBE.shape[-1], conv_weight_CW.shape[0], num_heads, inner, num_groups)
    launch = choose_launch(zxBCdt_LBE.dtype, inner // num_heads, conv_sizes[1] // num_groups, chunk_length)
    settings = _Settings(tuple(sizes), tuple(conv_sizes), num_groups, eps, launch)
    document_BL = None if segment_ids_BL is None else number_documents(segment_ids_BL).int()
    return _MambaCore.apply(zxBCdt_LBE, conv_weight_CW, conv_bias_C, A_log_H, D_H, dt_bias_H, norm_weight_I, document_BL, settings)


class _Settings(NamedTuple):
    sizes: tuple[int, int, int]
    conv_sizes: tuple[int, int, int]
    num_groups: int
    eps: float
    launch: ScanLaunch


class _MambaCore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        zxBCdt_LBE: Tensor,
        conv_weight_CW: Tensor,
        conv_bias_C: Tensor | None,
        A_log_H: Tensor,
        D_H: Tensor,
        dt_bias_H: Tensor,
        norm_weight_I: Tensor,
        document_BL: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        zxBCdt_LBE = with_dense_rows(zxBCdt_LBE)
        z_BLI, xBC_BLC, dt_BLH = zxBCdt_LBE.transpose(0, 1).split(settings.sizes, dim=-1)
        convolved_BLC = _convolve(xBC_BLC, conv_weight_CW.flatten(1), conv_bias_C, document_BL)
        scan = _scan(convolved_BLC, dt_BLH, A_log_H, D_H, dt_bias_H, document_BL, settings)
        y_BLI = _scan_outputs(scan, settings.launch)
        out_LBI = torch.empty_like(y_BLI.transpose(0, 1))
        norm_forward(y_BLI, z_BLI, norm_weight_I, settings.num_groups, settings.eps, out_LBI.transpose(0, 1))
        ctx.save_for_backward(
            zxBCdt_LBE,
            conv_weight_CW,
            conv_bias_C,
            A_log_H,
            D_H,
            dt_bias_H,
            norm_weight_I,
            document_BL,
            y_BLI,
        )
        ctx.settings = settings
        return out_LBI

    @staticmethod
    def backward(ctx, dout_LBI: Tensor) -> tuple[Tensor | None, ...]:
        zxBCdt_LBE, conv_weight_CW, conv_bias_C, A_log_H, D_H, dt_bias_H, norm_weight_I, document_BL, y_BLI = ctx.saved_tensors
        settings = ctx.settings
        z_BLI, xBC_BLC, dt_BLH = zxBCdt_LBE.transpose(0, 1).split(settings.sizes, dim=-1)
        dzxBCdt_LBE = torch.empty_like(zxBCdt_LBE, memory_format=torch.contiguous_format)
        dz_BLI, dxBC_BLC, ddt_BLH = dzxBCdt_LBE.transpose(0, 1).split(settings.sizes, dim=-1)

        convolved_BLC = _convolve(xBC_BLC, conv_weight_CW.flatten(1), conv_bias_C, document_BL)
        scan = _scan(convolved_BLC, dt_BLH, A_log_H, D_H, dt_bias_H, document_BL, settings)
        dout_BLI = with_dense_rows(dout_LBI).transpose(0, 1)
        dy_BLI = _like(convolved_BLC, settings.sizes[0])
        dnorm_weight_X1I = norm_backward(y_BLI, z_BLI, norm_weight_I, settings.num_groups, settings.eps, dout_BLI, dy_BLI, dz_BLI)

        dconvolved_BLC = torch.empty_like(convolved_BLC)
        gradients = ScanGradients(*_split(dconvolved_BLC, ddt_BLH, settings))
        dA_log_X1H, ddt_bias_X1H, dD_X1H, _ = scan_backward(
            scan, dy_BLI.unflatten(-1, scan.x_BLHP.shape[2:]), None, gradients, settings.launch
        )
        dconv_weight_XWC, dconv_bias_X1C, _ = conv_backward(
            xBC_BLC, conv_weight_CW.flatten(1), conv_bias_C, document_BL, None, dconvolved_BLC, dxBC_BLC
        )
        return (
            dzxBCdt_LBE,
            gradient_from_parts(conv_weight_CW, dconv_weight_XWC),
            None if conv_bias_C is None else gradient_from_parts(conv_bias_C, dconv_bias_X1C),
            gradient_from_parts(A_log_H, dA_log_X1H),
            gradient_from_parts(D_H, dD_X1H),
            gradient_from_parts(dt_bias_H, ddt_bias_X1H),
            gradient_from_parts(norm_weight_I, dnorm_weight_X1I),
            None,
            None,
        )


def _convolve(xBC_BLC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_BL: Tensor | None) -> Tensor:
    convolved_BLC = _like(xBC_BLC, xBC_BLC.shape[2])
    conv_forward(xBC_BLC, weight_CW, bias_C, document_BL, None, convolved_BLC)
    return convolved_BLC


def _split(xBC_BLC: Tensor, dt_BLH: Tensor, settings: _Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [B, L, H, P], dt, B and C [B, L, G, N] in the order of a scan's inputs, as views."""
    x_BLI, B_BLS, C_BLS = xBC_BLC.split(settings.conv_sizes, dim=-1)
    groups = (settings.num_groups, -1)
    return x_BLI.unflatten(-1, (dt_BLH.shape[-1], -1)), dt_BLH, B_BLS.unflatten(-1, groups), C_BLS.unflatten(-1, groups)


def _scan(
    xBC_BLC: Tensor,
    dt_BLH: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    document_BL: Tensor | None,
    settings: _Settings,
) -> Scan:
    x_BLHP, dt_BLH, B_BLGN, C_BLGN = _split(xBC_BLC, dt_BLH, settings)
    return Scan(x_BLHP, dt_BLH, A_log_H, B_BLGN, C_BLGN, D_H, dt_bias_H, None, document_BL)


def _scan_outputs(scan: Scan, launch: ScanLaunch) -> Tensor:
    y_BLI = _like(scan.x_BLHP, scan.x_BLHP.shape[2] * scan.x_BLHP.shape[3])
    scan_forward(scan, y_BLI.view(y_BLI.shape[:2] + scan.x_BLHP.shape[2:]), launch)
    return y_BLI


def _like(t_BLX: Tensor, width: int) -> Tensor:
    """Uninitialised [B, L, width], sequence first in memory."""
    return t_BLX.new_empty(t_BLX.shape[1], t_BLX.shape[0], width).transpose(0, 1)
