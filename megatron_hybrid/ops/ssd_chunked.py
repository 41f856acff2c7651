"""The Mamba-2 scan as matrix products over chunks of the sequence (Dao and Gu 2024, section 6), with a hand-derived backward.

Dimensions of chunked tensors: S chunks of K positions, B batch, G groups, R = H / G heads per group. The chunk axis leads, so that batch
and groups, or batch and heads, merge into one batch axis of a product, and the heads of a group share one product wherever B or C is an
operand.

Inside a chunk let c_t be the cumulative log decay. With l a target, s a source position, and H_c the state in front of chunk c,

    y_l = sum_{s <= l} (C_l B_s) W_ls x_s + out_l H_c C_l + D x_l     W_ls = exp(c_l - c_s) dt_s     out_l = exp(c_l)
    H_c = sum_{z <= c} T_cz (states of chunk z - 1)                   chunk state = sum_s into_s x_s B_s^T,  into_s = exp(c_K - c_s) dt_s

where T holds the decays between chunk boundaries and its column 0 those of the initial state. dt enters as log dt under the same
exponential. All exponents are at most log dt; whatever a mask removes gets exponent -inf before exponentiation, so that nothing overflows
forward or backward.

The backward recomputes W, out, into, T and C B^T; only the inputs and the states H_c are kept. The gradient of a decay step t sums what
passes over t, split so that no term cancels against another one that was rounded differently: within the chunk (rows minus columns of the
same products), from the chunk's initial state to targets at or after t, from sources before t to the chunk's end, and from end to end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.ops.segments import number_documents
from megatron_hybrid.ops.ssd import check_heads

LOG2_E = 1.4426950408889634


def ssd_chunked(
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
    chunk_length: int = 64,
) -> tuple[Tensor, Tensor]:
    """`ssd.ssd_reference` by chunks of `chunk_length` positions; any length, no loop over time or chunks.

    Inputs may have any strides (views of [L, B, ...] tensors are read in place); y has the axis order of x in memory. Matrix products
    run in the dtype of x, decays, the recurrence over chunks and reductions in fp32 (fp64 for fp64).
    Raises ValueError: H is not a multiple of G, or `chunk_length` is not positive.
    """
    check_heads(x_BLHP.shape[2], B_BLGN.shape[2])
    if chunk_length <= 0:
        raise ValueError(f"chunk_length must be a positive number of positions, got {chunk_length}")
    wide = torch.promote_types(x_BLHP.dtype, torch.float32)
    dt_BLH = F.softplus(dt_raw_BLH.to(wide) + dt_bias_H)
    A_H = -torch.exp(A_log_H.to(wide))
    document_BL = None if segment_ids_BL is None else number_documents(segment_ids_BL)
    return _ChunkedSSD.apply(
        x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H.to(wide), initial_state_BHPN, document_BL, min(chunk_length, x_BLHP.shape[1])
    )


class _Decays(NamedTuple):
    """See the module docstring; `between` is T."""

    within_SBHKK: Tensor
    out_SBHK: Tensor
    into_SBHK: Tensor
    between_BHZZ: Tensor


def _decays(dt_SBHK: Tensor, A_H: Tensor, document_SBK: Tensor | None) -> _Decays:
    # below this exponent exp2 is zero in the given precision: bounding steps there changes no result, and keeps differences of sums precise
    lowest_exponent = -150.0 if dt_SBHK.dtype == torch.float32 else -1100.0
    step_SBHK = (dt_SBHK * (A_H * LOG2_E)[:, None]).clamp_min_(lowest_exponent)
    may_read_KK, may_carry_ZZ = _lower_triangle(dt_SBHK.shape[-1], dt_SBHK), _lower_triangle(dt_SBHK.shape[0] + 1, dt_SBHK)
    if document_SBK is not None:
        before_BZ = F.pad(document_SBK[..., -1].t(), (1, 0))
        may_read_KK = may_read_KK & (document_SBK[..., :, None] == document_SBK[..., None, :])
        may_carry_ZZ = may_carry_ZZ & (before_BZ[:, :, None] == before_BZ[:, None, :])
    # sums over a mask, not cumulative ones: what precedes a document must not even enter its rounding
    target_SBHK = step_SBHK @ may_read_KK.mT.to(step_SBHK.dtype)
    boundary_BHZ = target_SBHK[..., -1].double().permute(1, 2, 0) @ may_carry_ZZ.tril(-1)[..., :-1].mT.double()
    log_dt_SBHK = dt_SBHK.log2()
    into_SBHK = torch.exp2(target_SBHK[..., -1:] - target_SBHK + log_dt_SBHK)
    out_SBHK = torch.exp2(target_SBHK)
    if document_SBK is not None:
        may_read_KK, may_carry_ZZ = may_read_KK[:, :, None], may_carry_ZZ[:, None]
        into_SBHK.masked_fill_((document_SBK != document_SBK[..., -1:])[:, :, None], 0)
        out_SBHK.masked_fill_((document_SBK != before_BZ.t()[:-1, :, None])[:, :, None], 0)
    within_SBHKK = (target_SBHK[..., :, None] - target_SBHK[..., None, :]).add_(_exclusion(may_read_KK, dt_SBHK.dtype))
    between_BHZZ = (boundary_BHZ[..., :, None] - boundary_BHZ[..., None, :]).add_(_exclusion(may_carry_ZZ, torch.float64))
    return _Decays(within_SBHKK.add_(log_dt_SBHK[..., None, :]).exp2_(), out_SBHK, into_SBHK, between_BHZZ.exp2_().to(dt_SBHK.dtype))


def _lower_triangle(size: int, like: Tensor) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=like.device).tril()


def _exclusion(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where the mask is True, -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


class _ChunkedSSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x_BLHP: Tensor,
        dt_BLH: Tensor,
        A_H: Tensor,
        B_BLGN: Tensor,
        C_BLGN: Tensor,
        D_H: Tensor,
        initial_BHPN: Tensor | None,
        document_BL: Tensor | None,
        chunk_length: int,
    ) -> tuple[Tensor, Tensor]:
        (batch, _, num_heads, _), (num_groups, num_states) = x_BLHP.shape, B_BLGN.shape[2:]
        x_SBHKP, B_SBGKN, C_SBGKN = (_by_chunk(t, chunk_length) for t in (x_BLHP, B_BLGN, C_BLGN))
        decays = _decays(_by_chunk(dt_BLH, chunk_length), A_H, _documents_by_chunk(document_BL, chunk_length))
        num_chunks, head_dim = x_SBHKP.shape[0], x_SBHKP.shape[-1]

        mixing_SBHKK = decays.within_SBHKK
        _by_group(mixing_SBHKK, num_groups).mul_((C_SBGKN @ B_SBGKN.mT).to(dt_BLH.dtype).unsqueeze(3))
        mixing_SBHKK.diagonal(dim1=-2, dim2=-1).add_(D_H[:, None])
        y_SBHKP = mixing_SBHKK.to(x_BLHP.dtype) @ x_SBHKP

        into_state_SBGKRP = _scale_heads_together(x_SBHKP, decays.into_SBHK, num_groups)
        states_ZBHPN = dt_BLH.new_empty(num_chunks + 1, batch, num_heads, head_dim, num_states)
        states_ZBHPN[0] = 0 if initial_BHPN is None else initial_BHPN
        _matmul_into(_merge_heads(states_ZBHPN[1:], num_groups), into_state_SBGKRP.flatten(-2).mT, B_SBGKN)
        states_BHZPN = _over_chunks(decays.between_BHZZ, states_ZBHPN)
        before_SBHPN = states_BHZPN[:, :, :-1].permute(2, 0, 1, 3, 4).to(x_BLHP.dtype, memory_format=torch.contiguous_format)
        from_state_SBGKRP = (C_SBGKN @ _merge_heads(before_SBHPN, num_groups).mT).unflatten(-1, (-1, head_dim))

        y_BLHP = _add_to_sequence(y_SBHKP, from_state_SBGKRP, decays.out_SBHK, x_BLHP)
        ctx.save_for_backward(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, initial_BHPN, document_BL, before_SBHPN)
        ctx.chunk_length = chunk_length
        ctx.set_materialize_grads(False)
        return y_BLHP, states_BHZPN[:, :, -1].clone()

    @staticmethod
    def backward(ctx, dy_BLHP: Tensor | None, dfinal_BHPN: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, initial_BHPN, document_BL, before_SBHPN = ctx.saved_tensors
        chunk_length, (num_groups, num_states) = ctx.chunk_length, B_BLGN.shape[2:]
        dy_BLHP = torch.zeros_like(x_BLHP) if dy_BLHP is None else dy_BLHP
        x_SBHKP, dy_SBHKP, B_SBGKN, C_SBGKN = (_by_chunk(t, chunk_length) for t in (x_BLHP, dy_BLHP, B_BLGN, C_BLGN))
        dt_SBHK, document_SBK = _by_chunk(dt_BLH, chunk_length), _documents_by_chunk(document_BL, chunk_length)
        decays = _decays(dt_SBHK, A_H, document_SBK)
        wide, (num_chunks, batch, num_heads, _, head_dim) = dt_BLH.dtype, x_SBHKP.shape

        scores_SBG1KK = (C_SBGKN @ B_SBGKN.mT).to(wide).unsqueeze(3)
        dmixing_SBHKK = (dy_SBHKP @ x_SBHKP.mT).to(wide)
        dD_H = dmixing_SBHKK.diagonal(dim1=-2, dim2=-1).sum((0, 1, 3))
        dmixing_SBGRKK = _by_group(dmixing_SBHKK.mul_(decays.within_SBHKK), num_groups)
        dscores_SBGKK = dmixing_SBGRKK.sum(3).to(x_BLHP.dtype)
        dmixing_SBGRKK.mul_(scores_SBG1KK)
        at_target_SBHK, at_source_SBHK = dmixing_SBHKK.sum(-1), dmixing_SBHKK.sum(-2)
        mixing_SBHKK = decays.within_SBHKK
        _by_group(mixing_SBHKK, num_groups).mul_(scores_SBG1KK)
        mixing_SBHKK.diagonal(dim1=-2, dim2=-1).add_(D_H[:, None])
        dx_SBHKP = mixing_SBHKK.to(x_BLHP.dtype).mT @ dy_SBHKP

        from_state_SBGKRP = _scale_heads_together(dy_SBHKP, decays.out_SBHK, num_groups)
        dstates_ZBHPN = dt_BLH.new_empty(num_chunks + 1, batch, num_heads, head_dim, num_states)
        dstates_ZBHPN[-1] = 0 if dfinal_BHPN is None else dfinal_BHPN
        _matmul_into(_merge_heads(dstates_ZBHPN[:-1], num_groups), from_state_SBGKRP.flatten(-2).mT, C_SBGKN)
        dstates_BHZPN = _over_chunks(decays.between_BHZZ.mT, dstates_ZBHPN)
        dafter_SBHPN = dstates_BHZPN[:, :, 1:].permute(2, 0, 1, 3, 4).to(memory_format=torch.contiguous_format)
        passed_SBH = (dafter_SBHPN * before_SBHPN).sum((-2, -1))
        across_SBH1 = passed_SBH[..., None] * decays.between_BHZZ.diagonal(-1, -2, -1).permute(2, 0, 1)[..., None]
        dafter_SBGRPN = _merge_heads(dafter_SBHPN.to(x_BLHP.dtype), num_groups)

        into_state_SBGKRP = _scale_heads_together(x_SBHKP, decays.into_SBHK, num_groups)
        dinto_SBGKRP = (B_SBGKN @ dafter_SBGRPN.mT).unflatten(-1, (-1, head_dim))
        dB_SBGKN = into_state_SBGKRP.flatten(-2) @ dafter_SBGRPN
        dB_SBGKN += dscores_SBGKK.mT @ C_SBGKN
        into_end_SBHK = into_state_SBGKRP.mul_(dinto_SBGKRP).sum(-1, dtype=wide).mT.flatten(2, 3)
        dC_SBGRKN = _by_group((dy_SBHKP @ before_SBHPN).to(wide).mul_(decays.out_SBHK[..., None]), num_groups)
        from_start_SBHK = (dC_SBGRKN * C_SBGKN.unsqueeze(3)).sum(-1).flatten(2, 3)
        dC_SBGKN = dC_SBGRKN.sum(3)
        dC_SBGKN += dscores_SBGKK @ B_SBGKN

        dx_BLHP = _add_to_sequence(dx_SBHKP, dinto_SBGKRP, decays.into_SBHK, x_BLHP)
        dstep_SBHK = _suffix_sum(at_target_SBHK - at_source_SBHK, document_SBK) + _suffix_sum(from_start_SBHK, None)
        dstep_SBHK += into_end_SBHK.cumsum(-1) - into_end_SBHK + across_SBH1
        # log dt is -inf where dt underflowed or is padding: nothing came from there
        dlog_dt_SBHK = torch.where(dt_SBHK > 0, (at_source_SBHK + into_end_SBHK) / dt_SBHK, 0)
        ddt_SBHK = torch.addcmul(dlog_dt_SBHK, dstep_SBHK, A_H[:, None])
        return (
            dx_BLHP,
            _to_sequence(ddt_SBHK, dt_BLH),
            (dstep_SBHK * dt_SBHK).sum((0, 1, 3)),
            _to_sequence(dB_SBGKN, B_BLGN),
            _to_sequence(dC_SBGKN, C_BLGN),
            dD_H,
            None if initial_BHPN is None else dstates_BHZPN[:, :, 0].to(initial_BHPN.dtype),
            None,
            None,
        )


def _by_chunk(t_BLXY: Tensor, chunk_length: int) -> Tensor:
    """[B, L, X, ...] -> [S, B, X, K, ...] contiguous, the last chunk filled up with zeros."""
    padding = -t_BLXY.shape[1] % chunk_length
    if padding:
        t_BLXY = F.pad(t_BLXY, (0, 0) * (t_BLXY.dim() - 2) + (0, padding))
    return t_BLXY.unflatten(1, (-1, chunk_length)).movedim((1, 0, 3, 2), (0, 1, 2, 3)).contiguous()


def _documents_by_chunk(document_BL: Tensor | None, chunk_length: int) -> Tensor | None:
    """[B, L] -> [S, B, K]; filling continues the last document."""
    if document_BL is None:
        return None
    padding = -document_BL.shape[1] % chunk_length
    padded_BL = torch.cat((document_BL, document_BL[:, -1:].expand(-1, padding)), dim=1)
    return padded_BL.unflatten(1, (-1, chunk_length)).transpose(0, 1)


def _sequence_like(t_BLXY: Tensor, length: int) -> Tensor:
    """Uninitialised [B, length, X, ...] with batch and sequence in the memory order of t."""
    if t_BLXY.stride(0) < t_BLXY.stride(1):
        return t_BLXY.new_empty(length, t_BLXY.shape[0], *t_BLXY.shape[2:]).transpose(0, 1)
    return t_BLXY.new_empty(t_BLXY.shape[0], length, *t_BLXY.shape[2:])


def _chunk_view(t_BLXY: Tensor, num_chunks: int) -> Tensor:
    """[B, S K, X, ...] -> [S, B, X, K, ...], a view."""
    return t_BLXY.unflatten(1, (num_chunks, -1)).movedim((1, 0, 3, 2), (0, 1, 2, 3))


def _to_sequence(t_SBXKY: Tensor, like_BLXY: Tensor) -> Tensor:
    """Inverse of `_by_chunk`, in the dtype, length and memory order of `like_BLXY`."""
    result = _sequence_like(like_BLXY, t_SBXKY.shape[0] * t_SBXKY.shape[3])
    _chunk_view(result, t_SBXKY.shape[0]).copy_(t_SBXKY)
    return result[:, : like_BLXY.shape[1]]


def _add_to_sequence(t_SBHKP: Tensor, other_SBGKRP: Tensor, factor_SBHK: Tensor, like_BLHP: Tensor) -> Tensor:
    """`t + factor * other` in the dtype, length and memory order of `like_BLHP`."""
    num_groups = other_SBGKRP.shape[2]
    result = _sequence_like(like_BLHP, t_SBHKP.shape[0] * t_SBHKP.shape[3])
    factor_SBGRK1 = _by_group(factor_SBHK, num_groups)[..., None].to(t_SBHKP.dtype)
    target_SBGRKP = _by_group(_chunk_view(result, t_SBHKP.shape[0]), num_groups)
    torch.addcmul(_by_group(t_SBHKP, num_groups), other_SBGKRP.transpose(3, 4), factor_SBGRK1, out=target_SBGRKP)
    return result[:, : like_BLHP.shape[1]]


def _by_group(t_SBHXY: Tensor, num_groups: int) -> Tensor:
    """Split heads into groups: [S, B, H, ...] -> [S, B, G, R, ...]."""
    return t_SBHXY.unflatten(2, (num_groups, -1))


def _merge_heads(t_SBHPN: Tensor, num_groups: int) -> Tensor:
    """[S, B, H, P, N] -> [S, B, G, R P, N]."""
    return _by_group(t_SBHPN, num_groups).flatten(3, 4)


def _scale_heads_together(t_SBHKP: Tensor, factor_SBHK: Tensor, num_groups: int) -> Tensor:
    """`factor * t` as [S, B, G, K, R, P], in the dtype of t: the heads of a group lie side by side as columns of one matrix."""
    t_SBGKRP = _by_group(t_SBHKP, num_groups).transpose(3, 4)
    factor_SBGKR1 = _by_group(factor_SBHK, num_groups).transpose(3, 4)[..., None].to(t_SBHKP.dtype)
    return torch.mul(t_SBGKRP, factor_SBGKR1, out=torch.empty_like(t_SBGKRP, memory_format=torch.contiguous_format))


def _matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`a @ b` written to `out`, which may be of a wider dtype."""
    if out.dtype == a.dtype:
        torch.matmul(a, b, out=out)
    else:
        out.copy_(a @ b)


def _over_chunks(weights_BHZZ: Tensor, states_ZBHPN: Tensor) -> Tensor:
    """`sum_z weights[..., c, z] * states[z]` for every boundary c, as [B, H, Z, P, N]."""
    num_boundaries, batch, num_heads, head_dim, num_states = states_ZBHPN.shape
    states = states_ZBHPN.view(num_boundaries, batch * num_heads, head_dim * num_states).transpose(0, 1)
    return torch.bmm(weights_BHZZ.flatten(0, 1), states).view(batch, num_heads, num_boundaries, head_dim, num_states)


def _suffix_sum(t_SBHK: Tensor, document_SBK: Tensor | None) -> Tensor:
    """Sum over the positions at or after each one in its chunk, and in its document if given."""
    if document_SBK is None:
        return t_SBHK.flip(-1).cumsum(-1).flip(-1)
    same_document_SBKK = (document_SBK[..., :, None] == document_SBK[..., None, :]).tril()
    return t_SBHK @ same_document_SBKK.to(t_SBHK.dtype)
