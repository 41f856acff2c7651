"""The Mamba-2 state-space scan (Dao and Gu 2024, "Transformers are SSMs", arXiv 2405.21060): its specification and the decoding step.

Per head, with decay a_t = exp(dt_t A) and A = -exp(A_log) < 0:

    h_t = a_t h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t        dt_t = softplus(dt_raw_t + dt_bias)

H heads share G groups of B and C: head h reads group h // (H / G). `ssd_chunked.py` computes the same by matrix products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.ops.segments import number_documents


def ssd_reference(
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
) -> tuple[Tensor, Tensor]:
    """The recurrence above, one step at a time: every implementation named "ssd" takes these arguments and returns this pair.

    Args:
        x_BLHP: inputs, P channels per head. B_BLGN, C_BLGN: same dtype as x; H must be a multiple of G.
        dt_raw_BLH: step sizes before bias and softplus. A_log_H, D_H, dt_bias_H: per head, kept in fp32 by the model.
        segment_ids_BL: integer document ids; the state is zeroed wherever the id changes.
        initial_state_BHPN: state before the first position, which the first document continues; zero if None.

    Returns:
        y_BLHP in the dtype of x, and the state after the last position [B, H, P, N] in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: H is not a multiple of G.
    """
    check_heads(x_BLHP.shape[2], B_BLGN.shape[2])
    wide = torch.promote_types(x_BLHP.dtype, torch.float32)
    num_heads_per_group = x_BLHP.shape[2] // B_BLGN.shape[2]
    B_BLHN = B_BLGN.to(wide).repeat_interleave(num_heads_per_group, dim=2)
    C_BLHN = C_BLGN.to(wide).repeat_interleave(num_heads_per_group, dim=2)
    x_wide, dt_BLH = x_BLHP.to(wide), F.softplus(dt_raw_BLH.to(wide) + dt_bias_H)
    decay_BLH = torch.exp(dt_BLH * -torch.exp(A_log_H.to(wide)))
    if segment_ids_BL is not None:
        document_BL = number_documents(segment_ids_BL)
        starts_BL = F.pad(document_BL[:, 1:] != document_BL[:, :-1], (1, 0))
        decay_BLH = decay_BLH.masked_fill(starts_BL[:, :, None], 0)
    if initial_state_BHPN is None:
        initial_state_BHPN = x_wide.new_zeros(x_BLHP.shape[0], *x_BLHP.shape[2:], B_BLGN.shape[-1])
    state = initial_state_BHPN.to(wide)
    outputs = []
    for t in range(x_BLHP.shape[1]):
        update_BHPN = (dt_BLH[:, t, :, None] * x_wide[:, t])[..., None] * B_BLHN[:, t, :, None, :]
        state = decay_BLH[:, t, :, None, None] * state + update_BHPN
        outputs.append((state * C_BLHN[:, t, :, None, :]).sum(-1) + D_H[:, None] * x_wide[:, t])
    return torch.stack(outputs, dim=1).to(x_BLHP.dtype), state


def ssd_step(
    state_BHPN: Tensor,
    x_BHP: Tensor,
    dt_raw_BH: Tensor,
    A_log_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
) -> tuple[Tensor, Tensor]:
    """`ssd_reference` at L = 1, for decoding. Returns y [B, H, P] in the dtype of x and the new state; `state_BHPN` is left alone."""
    check_heads(x_BHP.shape[1], B_BGN.shape[1])
    num_heads_per_group = x_BHP.shape[1] // B_BGN.shape[1]
    B_BHN = B_BGN.to(state_BHPN.dtype).repeat_interleave(num_heads_per_group, dim=1)
    C_BHN = C_BGN.to(state_BHPN.dtype).repeat_interleave(num_heads_per_group, dim=1)
    x_wide, dt_BH = x_BHP.to(state_BHPN.dtype), F.softplus(dt_raw_BH.to(state_BHPN.dtype) + dt_bias_H)
    decay_BH = torch.exp(dt_BH * -torch.exp(A_log_H.to(state_BHPN.dtype)))
    state_BHPN = torch.addcmul((dt_BH[..., None] * x_wide)[..., None] * B_BHN[:, :, None, :], decay_BH[..., None, None], state_BHPN)
    y_BHP = (state_BHPN @ C_BHN[..., None]).squeeze(-1) + D_H[:, None] * x_wide
    return y_BHP.to(x_BHP.dtype), state_BHPN


def check_heads(num_heads: int, num_groups: int) -> None:
    if num_heads % num_groups:
        raise ValueError(f"{num_heads} heads cannot share {num_groups} groups of B and C evenly; heads must be a multiple on every rank")
