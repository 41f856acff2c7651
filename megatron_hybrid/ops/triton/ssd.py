"""The Mamba-2 scan in Triton: `ssd.ssd_reference` by chunks, with the states walked in registers.

Forward is three kernels: decays; a walk over the chunks in order, which keeps each head's state in registers and writes the state in front
of every chunk in the dtype of x; and the outputs of all chunks at once. Backward walks again, then backwards with dy and C for the
gradients of the states, and takes all other gradients of a chunk in one kernel that loops over the heads of a group, so that neither
chunk states in fp32, nor C B^T, nor per-head gradients of B and C ever lie in memory. Forward and backward choose their chunk lengths
apart: the sums are the same, long chunks mean fewer states in memory, short ones leave registers for the four sums of the backward.

`scan_forward` and `scan_backward` work on tensors that the caller owns, in any strides with a dense last axis, so that `mamba_core.py`
can give them views of the model's projections and of their gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from megatron_hybrid.ops.segments import number_documents
from megatron_hybrid.ops.ssd import check_heads
from megatron_hybrid.ops.triton.launch import (
    ProductLaunch,
    ScanLaunch,
    WalkLaunch,
    block_size,
    check_tensors,
    dense_like,
    dot_precision,
    scan_launch,
    with_dense_rows,
)
from megatron_hybrid.ops.triton.ssd_gradient_kernels import decay_gradient_kernel, key_gradient_kernel, source_gradient_kernel
from megatron_hybrid.ops.triton.ssd_kernels import chunk_output_kernel, decay_kernel, state_walk_kernel

HEADS_PER_DECAY_PROGRAM = 16


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
    Raises ValueError: H is not a multiple of G, an input is on a CPU or in another dtype, or `chunk_length` is none of these.
    """
    check_heads(x_BLHP.shape[2], B_BLGN.shape[2])
    check_tensors(x_BLHP=x_BLHP, dt_raw_BLH=dt_raw_BLH, B_BLGN=B_BLGN, C_BLGN=C_BLGN)
    launch = choose_launch(x_BLHP.dtype, x_BLHP.shape[3], B_BLGN.shape[3], chunk_length)
    document_BL = None if segment_ids_BL is None else number_documents(segment_ids_BL).int()
    return _ScanFunction.apply(x_BLHP, dt_raw_BLH, A_log_H, B_BLGN, C_BLGN, D_H, dt_bias_H, initial_state_BHPN, document_BL, launch)


def choose_launch(dtype: torch.dtype, head_dim: int, state_dim: int, chunk_length: int | None) -> ScanLaunch:
    """The pinned launch parameters, with another chunk length if one is asked for."""
    launch = scan_launch(dtype, head_dim, state_dim)
    if chunk_length is None:
        return launch
    if chunk_length not in (16, 32, 64, 128, 256):
        raise ValueError(f"chunk_length must be 16, 32, 64, 128 or 256 positions for the Triton kernels, got {chunk_length}")
    return launch.with_chunks(chunk_length, chunk_length)


class Scan(NamedTuple):
    """The inputs of a scan; x [B, L, H, P], dt_raw [B, L, H], B and C [B, L, G, N] with dense last axes, document numbers int32 or None."""

    x_BLHP: Tensor
    dt_raw_BLH: Tensor
    A_log_H: Tensor
    B_BLGN: Tensor
    C_BLGN: Tensor
    D_H: Tensor
    dt_bias_H: Tensor
    initial_BHPN: Tensor | None
    document_BL: Tensor | None

    @property
    def num_heads_per_group(self) -> int:
        return self.x_BLHP.shape[2] // self.B_BLGN.shape[2]


class ScanGradients(NamedTuple):
    """Where the backward writes: tensors shaped as the inputs, with dense last axes."""

    dx_BLHP: Tensor
    ddt_raw_BLH: Tensor
    dB_BLGN: Tensor
    dC_BLGN: Tensor


class _Decays(NamedTuple):
    """The vectors described in `ssd_kernels.py`."""

    target_BSHK: Tensor
    source_BSHK: Tensor
    into_BSHK: Tensor
    out_BSHK: Tensor
    total_BSH: Tensor


def scan_forward(scan: Scan, y_BLHP: Tensor, launch: ScanLaunch) -> Tensor:
    """Write y; return the state behind the last position, [B, H, P, N] fp32."""
    chunk_length, precision = launch.forward_chunk, dot_precision(scan.x_BLHP.dtype)
    (batch, length, num_heads, head_dim), (num_groups, num_states) = scan.x_BLHP.shape, scan.B_BLGN.shape[2:]
    decays = _decays(scan, chunk_length)
    states_BSHPN, final_BHPN = _walk(scan.x_BLHP, scan.B_BLGN, decays.into_BSHK, decays.total_BSH, scan.initial_BHPN, launch.forward_walk)
    num_chunks, options = states_BSHPN.shape[1], launch.output
    block_l = min(options.block_l, chunk_length)
    num_head_blocks = num_groups * triton.cdiv(scan.num_heads_per_group, options.num_heads)
    chunk_output_kernel[(num_chunks * (chunk_length // block_l), num_head_blocks, batch)](
        scan.x_BLHP,
        scan.B_BLGN,
        scan.C_BLGN,
        scan.D_H,
        states_BSHPN,
        decays.target_BSHK,
        decays.source_BSHK,
        decays.out_BSHK,
        scan.document_BL,
        y_BLHP,
        length,
        num_chunks,
        num_heads,
        scan.num_heads_per_group,
        *scan.x_BLHP.stride()[:3],
        *scan.B_BLGN.stride()[:3],
        *scan.C_BLGN.stride()[:3],
        *y_BLHP.stride()[:3],
        HAS_DOCUMENTS=scan.document_BL is not None,
        P=head_dim,
        N=num_states,
        K=chunk_length,
        BLOCK_L=block_l,
        BLOCK_P=block_size(head_dim),
        BLOCK_N=block_size(num_states),
        NUM_HEADS=options.num_heads,
        PRECISION=precision,
        num_warps=options.num_warps,
        num_stages=options.num_stages,
    )
    return final_BHPN


def scan_backward(
    scan: Scan, dy_BLHP: Tensor, dfinal_BHPN: Tensor | None, gradients: ScanGradients, launch: ScanLaunch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write `gradients`; return those of A_log, dt_bias and D [H], and of the initial state [B, H, P, N], all fp32."""
    decays = _decays(scan, launch.backward_chunk)
    walk = launch.backward_walk
    states_BSHPN, _ = _walk(scan.x_BLHP, scan.B_BLGN, decays.into_BSHK, decays.total_BSH, scan.initial_BHPN, walk)
    dstates_BSHPN, dinitial_BHPN, across_WBSH = _walk_back(
        dy_BLHP, scan.C_BLGN, decays.out_BSHK, decays.total_BSH, dfinal_BHPN, states_BSHPN, walk
    )
    # per chunk: dA_log, ddt_bias, dD
    per_head_3BSH = across_WBSH.new_empty(3, *across_WBSH.shape[1:])
    dscores_BSGKK, at_target_BSHK, at_source_BSHK = _source_gradients(
        scan, dy_BLHP, dstates_BSHPN, decays, gradients.dx_BLHP, per_head_3BSH[2], launch.source_gradient
    )
    into_end_BSHK = _key_gradients(
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
    from_start_BSHK = _key_gradients(
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
    (batch, length, num_heads), num_chunks = scan.dt_raw_BLH.shape, states_BSHPN.shape[1]
    decay_gradient_kernel[(batch * num_chunks, triton.cdiv(num_heads, HEADS_PER_DECAY_PROGRAM))](
        scan.dt_raw_BLH,
        scan.A_log_H,
        scan.dt_bias_H,
        scan.document_BL,
        at_target_BSHK,
        at_source_BSHK,
        from_start_BSHK,
        into_end_BSHK,
        across_WBSH,
        gradients.ddt_raw_BLH,
        per_head_3BSH[0],
        per_head_3BSH[1],
        length,
        num_chunks,
        num_heads,
        across_WBSH.shape[0],
        *scan.dt_raw_BLH.stride()[:2],
        *gradients.ddt_raw_BLH.stride()[:2],
        HAS_DOCUMENTS=scan.document_BL is not None,
        K=launch.backward_chunk,
        BLOCK_H=HEADS_PER_DECAY_PROGRAM,
        num_warps=4,
    )
    dA_log_H, ddt_bias_H, dD_H = per_head_3BSH.sum((1, 2)).unbind()
    return dA_log_H, ddt_bias_H, dD_H, dinitial_BHPN


def _source_gradients(
    scan: Scan, dy_BLHP: Tensor, dstates_BSHPN: Tensor, decays: _Decays, dx_BLHP: Tensor, dD_BSH: Tensor, options: ProductLaunch
) -> tuple[Tensor, Tensor, Tensor]:
    """Write dx and dD; return dscores, at_target and at_source as `source_gradient_kernel` defines them."""
    (batch, length, num_heads, head_dim), (num_groups, num_states) = scan.x_BLHP.shape, scan.B_BLGN.shape[2:]
    num_chunks, chunk_length = decays.into_BSHK.shape[1], decays.into_BSHK.shape[3]
    at_target_BSHK, at_source_BSHK = torch.empty_like(decays.into_BSHK), torch.empty_like(decays.into_BSHK)
    dscores_BSGKK = scan.B_BLGN.new_empty(batch, num_chunks, num_groups, chunk_length, chunk_length)
    source_gradient_kernel[(num_chunks, num_groups, batch)](
        scan.x_BLHP,
        scan.B_BLGN,
        scan.C_BLGN,
        scan.D_H,
        dy_BLHP,
        dstates_BSHPN,
        decays.target_BSHK,
        decays.source_BSHK,
        decays.into_BSHK,
        scan.document_BL,
        dx_BLHP,
        dscores_BSGKK,
        at_target_BSHK,
        at_source_BSHK,
        dD_BSH,
        length,
        num_chunks,
        num_heads,
        num_heads // num_groups,
        *scan.x_BLHP.stride()[:3],
        *scan.B_BLGN.stride()[:3],
        *scan.C_BLGN.stride()[:3],
        *dy_BLHP.stride()[:3],
        *dx_BLHP.stride()[:3],
        HAS_DOCUMENTS=scan.document_BL is not None,
        P=head_dim,
        N=num_states,
        K=chunk_length,
        BLOCK_P=block_size(head_dim),
        BLOCK_N=block_size(num_states),
        PRECISION=dot_precision(scan.x_BLHP.dtype),
        num_warps=options.num_warps,
        num_stages=options.num_stages,
    )
    return dscores_BSGKK, at_target_BSHK, at_source_BSHK


def _key_gradients(
    value_BLHP: Tensor,
    key_BLGN: Tensor,
    other_key_BLGN: Tensor,
    states_BSHPN: Tensor,
    dscores_BSGKK: Tensor,
    weight_BSHK: Tensor,
    dkey_BLGN: Tensor,
    options: ProductLaunch,
    *,
    of_targets: bool,
) -> Tensor:
    """Write the gradient of B or C; return `through` as `key_gradient_kernel` defines it."""
    (batch, length, num_heads, head_dim), (num_groups, num_states) = value_BLHP.shape, key_BLGN.shape[2:]
    num_chunks, chunk_length = weight_BSHK.shape[1], weight_BSHK.shape[3]
    through_BSHK = torch.empty_like(weight_BSHK)
    key_gradient_kernel[(num_chunks, num_groups, batch)](
        value_BLHP,
        key_BLGN,
        other_key_BLGN,
        states_BSHPN,
        dscores_BSGKK,
        weight_BSHK,
        dkey_BLGN,
        through_BSHK,
        length,
        num_chunks,
        num_heads,
        num_heads // num_groups,
        *value_BLHP.stride()[:3],
        *key_BLGN.stride()[:3],
        *other_key_BLGN.stride()[:3],
        *dkey_BLGN.stride()[:3],
        OF_TARGETS=of_targets,
        P=head_dim,
        N=num_states,
        K=chunk_length,
        BLOCK_P=block_size(head_dim),
        BLOCK_N=block_size(num_states),
        PRECISION=dot_precision(value_BLHP.dtype),
        num_warps=options.num_warps,
        num_stages=options.num_stages,
    )
    return through_BSHK


def _decays(scan: Scan, chunk_length: int) -> _Decays:
    batch, length, num_heads = scan.dt_raw_BLH.shape
    num_chunks = triton.cdiv(length, chunk_length)
    decays_4BSHK = scan.A_log_H.new_empty(4, batch, num_chunks, num_heads, chunk_length, dtype=torch.float32)
    decays = _Decays(*decays_4BSHK.unbind(), decays_4BSHK.new_empty(batch, num_chunks, num_heads))
    decay_kernel[(batch * num_chunks, triton.cdiv(num_heads, HEADS_PER_DECAY_PROGRAM))](
        scan.dt_raw_BLH,
        scan.A_log_H,
        scan.dt_bias_H,
        scan.document_BL,
        *decays,
        length,
        num_chunks,
        num_heads,
        *scan.dt_raw_BLH.stride()[:2],
        HAS_DOCUMENTS=scan.document_BL is not None,
        K=chunk_length,
        BLOCK_H=HEADS_PER_DECAY_PROGRAM,
        num_warps=4,
    )
    return decays


def _walk(
    value_BLHP: Tensor, key_BLGN: Tensor, weight_BSHK: Tensor, total_BSH: Tensor, initial_BHPN: Tensor | None, options: WalkLaunch
) -> tuple[Tensor, Tensor]:
    """The states in front of each chunk [B, S, H, P, N] in the dtype of the values, and the last one, fp32."""
    return _launch_walk(value_BLHP, key_BLGN, weight_BSHK, total_BSH, initial_BHPN, None, None, options)


def _walk_back(
    value_BLHP: Tensor,
    key_BLGN: Tensor,
    weight_BSHK: Tensor,
    total_BSH: Tensor,
    dfinal_BHPN: Tensor | None,
    states_BSHPN: Tensor,
    options: WalkLaunch,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the states behind each chunk, of the initial state, and `across` in parts, as `state_walk_kernel` defines it."""
    num_parts = _num_parts(options, *states_BSHPN.shape[3:])
    across_WBSH = total_BSH.new_empty(num_parts, *total_BSH.shape)
    return *_launch_walk(value_BLHP, key_BLGN, weight_BSHK, total_BSH, dfinal_BHPN, states_BSHPN, across_WBSH, options), across_WBSH


def _num_parts(options: WalkLaunch, head_dim: int, num_states: int) -> int:
    return triton.cdiv(head_dim, options.block_p) * triton.cdiv(num_states, options.block_n)


def _launch_walk(
    value_BLHP: Tensor,
    key_BLGN: Tensor,
    weight_BSHK: Tensor,
    total_BSH: Tensor,
    initial_BHPN: Tensor | None,
    other_states_BSHPN: Tensor | None,
    across_WBSH: Tensor | None,
    options: WalkLaunch,
) -> tuple[Tensor, Tensor]:
    (batch, length, num_heads, head_dim), (num_groups, num_states) = value_BLHP.shape, key_BLGN.shape[2:]
    num_chunks, chunk_length = weight_BSHK.shape[1], weight_BSHK.shape[3]
    states_BSHPN = value_BLHP.new_empty(batch, num_chunks, num_heads, head_dim, num_states)
    final_BHPN = total_BSH.new_empty(batch, num_heads, head_dim, num_states)
    state_walk_kernel[(_num_parts(options, head_dim, num_states), num_heads, batch)](
        value_BLHP,
        key_BLGN,
        weight_BSHK,
        total_BSH,
        None if initial_BHPN is None else initial_BHPN.contiguous(),
        states_BSHPN,
        final_BHPN,
        other_states_BSHPN,
        across_WBSH,
        length,
        num_chunks,
        num_heads,
        num_heads // num_groups,
        *value_BLHP.stride()[:3],
        *key_BLGN.stride()[:3],
        HAS_INITIAL=initial_BHPN is not None,
        REVERSE=other_states_BSHPN is not None,
        P=head_dim,
        N=num_states,
        K=chunk_length,
        BLOCK_P=options.block_p,
        BLOCK_N=options.block_n,
        PRECISION=dot_precision(value_BLHP.dtype),
        num_warps=options.num_warps,
        num_stages=options.num_stages,
    )
    return states_BSHPN, final_BHPN


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
        dA_log_H, ddt_bias_H, dD_H, dinitial_BHPN = scan_backward(scan, dy_BLHP, dfinal_BHPN, gradients, ctx.launch)
        return (
            gradients.dx_BLHP,
            gradients.ddt_raw_BLH,
            dA_log_H.to(scan.A_log_H.dtype),
            gradients.dB_BLGN,
            gradients.dC_BLGN,
            dD_H.to(scan.D_H.dtype),
            ddt_bias_H.to(scan.dt_bias_H.dtype),
            None if scan.initial_BHPN is None else dinitial_BHPN.to(scan.initial_BHPN.dtype),
            None,
            None,
        )
