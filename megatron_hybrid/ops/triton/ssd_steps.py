"""Each kernel of the scan as a function of tensors: sizes, strides and launch parameters are put in place here.

Tensors may have any strides with a dense last axis. Suffixes beyond the usual: S chunks, K positions of a chunk, W parts of what goes
across a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from megatron_hybrid.ops.triton.launch import OutputLaunch, ProductLaunch, SourceLaunch, WalkLaunch, block_size, dot_precision
from megatron_hybrid.ops.triton.ssd_gradient_kernels import decay_gradient_kernel, key_gradient_kernel, source_gradient_kernel
from megatron_hybrid.ops.triton.ssd_kernels import chunk_output_kernel, decay_kernel, state_walk_kernel

HEADS_PER_DECAY_PROGRAM = 16


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


class Decays(NamedTuple):
    """The vectors described in `ssd_kernels.py`."""

    target_BSHK: Tensor
    source_BSHK: Tensor
    into_BSHK: Tensor
    out_BSHK: Tensor
    total_BSH: Tensor


def decays_of(scan: Scan, chunk_length: int) -> Decays:
    """The decays of every chunk of `chunk_length` positions."""
    batch, length, num_heads = scan.dt_raw_BLH.shape
    num_chunks = triton.cdiv(length, chunk_length)
    decays_4BSHK = scan.A_log_H.new_empty(4, batch, num_chunks, num_heads, chunk_length, dtype=torch.float32)
    decays = Decays(*decays_4BSHK.unbind(), decays_4BSHK.new_empty(batch, num_chunks, num_heads))
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


def walk(
    value_BLHP: Tensor, key_BLGN: Tensor, weight_BSHK: Tensor, total_BSH: Tensor, initial_BHPN: Tensor | None, options: WalkLaunch
) -> tuple[Tensor, Tensor]:
    """The states in front of each chunk [B, S, H, P, N] in the dtype of the values, and the last one, fp32."""
    return _launch_walk(value_BLHP, key_BLGN, weight_BSHK, total_BSH, initial_BHPN, None, None, options)


def walk_back(
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
    across_BSHW = total_BSH.new_empty(*total_BSH.shape, num_parts * options.block_p)
    return *_launch_walk(value_BLHP, key_BLGN, weight_BSHK, total_BSH, dfinal_BHPN, states_BSHPN, across_BSHW, options), across_BSHW


def _num_parts(options: WalkLaunch, head_dim: int, num_states: int) -> int:
    return triton.cdiv(head_dim, options.block_p) * triton.cdiv(num_states, options.block_n)


def _launch_walk(
    value_BLHP: Tensor,
    key_BLGN: Tensor,
    weight_BSHK: Tensor,
    total_BSH: Tensor,
    initial_BHPN: Tensor | None,
    other_states_BSHPN: Tensor | None,
    across_BSHW: Tensor | None,
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
        across_BSHW,
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


def outputs(scan: Scan, decays: Decays, states_BSHPN: Tensor, y_BLHP: Tensor, options: OutputLaunch) -> None:
    """Write y, given the state in front of each chunk."""
    (batch, length, num_heads, head_dim), (num_groups, num_states) = scan.x_BLHP.shape, scan.B_BLGN.shape[2:]
    num_chunks, chunk_length = decays.into_BSHK.shape[1], decays.into_BSHK.shape[3]
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
        PRECISION=dot_precision(scan.x_BLHP.dtype),
        num_warps=options.num_warps,
        num_stages=options.num_stages,
    )


def source_gradients(
    scan: Scan, dy_BLHP: Tensor, dstates_BSHPN: Tensor, decays: Decays, dx_BLHP: Tensor, dD_BSH: Tensor, options: SourceLaunch
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
        TILE=min(options.tile, chunk_length),
        BLOCK_P=block_size(head_dim),
        BLOCK_N=block_size(num_states),
        PRECISION=dot_precision(scan.x_BLHP.dtype),
        num_warps=options.num_warps,
        num_stages=options.num_stages,
    )
    return dscores_BSGKK, at_target_BSHK, at_source_BSHK


def key_gradients(
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


def decay_gradients(
    scan: Scan,
    at_target_BSHK: Tensor,
    at_source_BSHK: Tensor,
    from_start_BSHK: Tensor,
    into_end_BSHK: Tensor,
    across_BSHW: Tensor,
    ddt_raw_BLH: Tensor,
    dA_log_BSH: Tensor,
    ddt_bias_BSH: Tensor,
) -> None:
    """Write the gradients of dt_raw, and of A_log and dt_bias per chunk."""
    (batch, length, num_heads), (num_chunks, _, chunk_length) = scan.dt_raw_BLH.shape, at_target_BSHK.shape[1:]
    decay_gradient_kernel[(batch * num_chunks, triton.cdiv(num_heads, HEADS_PER_DECAY_PROGRAM))](
        scan.dt_raw_BLH,
        scan.A_log_H,
        scan.dt_bias_H,
        scan.document_BL,
        at_target_BSHK,
        at_source_BSHK,
        from_start_BSHK,
        into_end_BSHK,
        across_BSHW,
        ddt_raw_BLH,
        dA_log_BSH,
        ddt_bias_BSH,
        length,
        num_chunks,
        num_heads,
        *scan.dt_raw_BLH.stride()[:2],
        *ddt_raw_BLH.stride()[:2],
        HAS_DOCUMENTS=scan.document_BL is not None,
        K=chunk_length,
        W=across_BSHW.shape[-1],
        BLOCK_W=triton.next_power_of_2(across_BSHW.shape[-1]),
        BLOCK_H=HEADS_PER_DECAY_PROGRAM,
        num_warps=4,
    )
