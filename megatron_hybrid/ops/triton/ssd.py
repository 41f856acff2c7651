"""The Mamba-2 scan in Triton: `ssd.ssd_reference` by chunks, with the states walked in registers.

Forward is three kernels: decays; a walk over the chunks in order, which keeps each head's state in registers and writes the state in front
of every chunk in the dtype of x; and the outputs of all chunks at once. Backward walks again, then backwards with dy and C for the
gradients of the states, and takes the other gradients of a chunk in kernels that loop over the heads of a group, so that neither chunk
states in fp32, nor C B^T per head, nor gradients of B and C per head ever lie in memory. One kernel for all of them would read less, but
its four sums over heads do not fit the registers; so the pairs inside a chunk have one and dB and dC one each. Forward and backward choose
their chunk lengths apart: the sums are the same, long chunks mean fewer states in memory, short ones fewer registers.

`scan_forward` and `scan_backward` work on tensors that the caller owns, in any strides with a dense last axis, so that `mamba_core.py`
can give them views of the model's projections and of their gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_hybrid.ops.segments import number_documents
from megatron_hybrid.ops.ssd import check_heads
from megatron_hybrid.ops.triton.launch import ScanLaunch, check_state, check_tensors, dense_like, scan_launch, with_dense_rows
from megatron_hybrid.ops.triton.row_sum import gradient_from_parts
from megatron_hybrid.ops.triton.ssd_steps import (
    Scan,
    decay_gradients,
    decays_of,
    key_gradients,
    outputs,
    source_gradients,
    walk,
    walk_back,
)


def ssd(
    x_BLHP: Tensor,
    dt_raw_BLH: Tensor,
    A_log_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    *,
    segment_ids_BL: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
    chunk_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd.ssd_reference` on a GPU. Products take the dtype of x (fp32, bf16, fp16) and sum in fp32, decays and states are fp32.

    Inputs may have any strides; y has the axis order of x in memory. `chunk_length`, a power of two from 16 to 256, replaces the chosen
    ones of forward and backward.
    Raises ValueError: H is not a multiple of G, an input is on a CPU or in another dtype, `chunk_length` is none of these, or the state
    is too large (`launch.check_state`).
    """
    check_heads(x_BLHP.shape[2], B_BLGN.shape[2])
    check_tensors(x_BLHP=x_BLHP, dt_raw_BLH=dt_raw_BLH, B_BLGN=B_BLGN, C_BLGN=C_BLGN)
    launch = choose_launch(x_BLHP.dtype, x_BLHP.shape[3], B_BLGN.shape[3], chunk_length)
    document_BL = None if segment_ids_BL is None else number_documents(segment_ids_BL).int()
    return _ScanFunction.apply(x_BLHP, dt_raw_BLH, A_log_H, B_BLGN, C_BLGN, D_H, dt_bias_H, initial_state_BHPN, document_BL, launch)


def choose_launch(dtype: torch.dtype, head_dim: int, state_dim: int, chunk_length: int | None) -> ScanLaunch:
    """The pinned launch parameters, with another chunk length if one is asked for; ValueError for a state that fits no GPU."""
    check_state(dtype, head_dim, state_dim)
    launch = scan_launch(dtype, head_dim, state_dim)
    if chunk_length is None:
        return launch
    if chunk_length not in (16, 32, 64, 128, 256):
        raise ValueError(f"chunk_length must be 16, 32, 64, 128 or 256 positions for the Triton kernels, got {chunk_length}")
    return launch.with_chunks(chunk_length, chunk_length)


class ScanGradients(NamedTuple):
    """Where the backward writes: tensors shaped as the inputs, with dense last axes."""

    dx_BLHP: Tensor
    ddt_raw_BLH: Tensor
    dB_BLGN: Tensor
    dC_BLGN: Tensor


def scan_forward(scan: Scan, y_BLHP: Tensor, launch: ScanLaunch) -> Tensor:
    """Write y; return the state behind the last position, [B, H, P, N] fp32."""
    decays = decays_of(scan, launch.forward_chunk)
    states_BSHPN, final_BHPN = walk(scan.x_BLHP, scan.B_BLGN, decays.into_BSHK, decays.total_BSH, scan.initial_BHPN, launch.forward_walk)
    outputs(scan, decays, states_BSHPN, y_BLHP, launch.output)
    return final_BHPN


def scan_backward(
    scan: Scan, dy_BLHP: Tensor, dfinal_BHPN: Tensor | None, gradients: ScanGradients, launch: ScanLaunch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write `gradients`; return those of A_log, dt_bias and D, in parts [B S, 1, H], and of the initial state [B, H, P, N], all fp32."""
    decays = decays_of(scan, launch.backward_chunk)
    states_BSHPN, _ = walk(scan.x_BLHP, scan.B_BLGN, decays.into_BSHK, decays.total_BSH, scan.initial_BHPN, launch.backward_walk)
    dstates_BSHPN, dinitial_BHPN, across_BSHW = walk_back(
        dy_BLHP, scan.C_BLGN, decays.out_BSHK, decays.total_BSH, dfinal_BHPN, states_BSHPN, launch.backward_walk
    )
    # per chunk: dA_log, ddt_bias, dD
    per_head_3BSH = across_BSHW.new_empty(3, *across_BSHW.shape[:-1])
    dscores_BSGKK, at_target_BSHK, at_source_BSHK = source_gradients(
        scan, dy_BLHP, dstates_BSHPN, decays, gradients.dx_BLHP, per_head_3BSH[2], launch.source_gradient
    )
    into_end_BSHK = key_gradients(
        scan.x_BLHP,
        scan.B_BLGN,
        scan.C_BLGN,
        dstates_BSHPN,
        dscores_BSGKK,
        decays.into_BSHK,
        gradients.dB_BLGN,
        launch.key_gradient,
        of_targets=False,
    )
    from_start_BSHK = key_gradients(
        dy_BLHP,
        scan.C_BLGN,
        scan.B_BLGN,
        states_BSHPN,
        dscores_BSGKK,
        decays.out_BSHK,
        gradients.dC_BLGN,
        launch.key_gradient,
        of_targets=True,
    )
    decay_gradients(
        scan,
        at_target_BSHK,
        at_source_BSHK,
        from_start_BSHK,
        into_end_BSHK,
        across_BSHW,
        gradients.ddt_raw_BLH,
        per_head_3BSH[0],
        per_head_3BSH[1],
    )
    return *per_head_3BSH.flatten(1, 2).unsqueeze(2).unbind(), dinitial_BHPN


class _ScanFunction(torch.autograd.Function):
    """Keeps the inputs alone."""

    @staticmethod
    def forward(
        ctx,
        x_BLHP: Tensor,
        dt_raw_BLH: Tensor,
        A_log_H: Tensor,
        B_BLGN: Tensor,
        C_BLGN: Tensor,
        D_H: Tensor,
        dt_bias_H: Tensor,
        initial_BHPN: Tensor | None,
        document_BL: Tensor | None,
        launch: ScanLaunch,
    ) -> tuple[Tensor, Tensor]:
        x_BLHP, dt_raw_BLH, B_BLGN, C_BLGN = (with_dense_rows(t) for t in (x_BLHP, dt_raw_BLH, B_BLGN, C_BLGN))
        scan = Scan(x_BLHP, dt_raw_BLH, A_log_H, B_BLGN, C_BLGN, D_H, dt_bias_H, initial_BHPN, document_BL)
        y_BLHP = dense_like(x_BLHP)
        final_BHPN = scan_forward(scan, y_BLHP, launch)
        ctx.save_for_backward(*scan)
        ctx.launch = launch
        ctx.set_materialize_grads(False)
        return y_BLHP, final_BHPN

    @staticmethod
    def backward(ctx, dy_BLHP: Tensor | None, dfinal_BHPN: Tensor | None) -> tuple[Tensor | None, ...]:
        scan = Scan(*ctx.saved_tensors)
        dy_BLHP = torch.zeros_like(scan.x_BLHP) if dy_BLHP is None else with_dense_rows(dy_BLHP)
        gradients = ScanGradients(*(dense_like(t) for t in (scan.x_BLHP, scan.dt_raw_BLH, scan.B_BLGN, scan.C_BLGN)))
        dA_log_X1H, ddt_bias_X1H, dD_X1H, dinitial_BHPN = scan_backward(scan, dy_BLHP, dfinal_BHPN, gradients, ctx.launch)
        return (
            gradients.dx_BLHP,
            gradients.ddt_raw_BLH,
            gradient_from_parts(scan.A_log_H, dA_log_X1H),
            gradients.dB_BLGN,
            gradients.dC_BLGN,
            gradient_from_parts(scan.D_H, dD_X1H),
            gradient_from_parts(scan.dt_bias_H, ddt_bias_X1H),
            None if scan.initial_BHPN is None else dinitial_BHPN.to(scan.initial_BHPN.dtype),
            None,
            None,
        )
