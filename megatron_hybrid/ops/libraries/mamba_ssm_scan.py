"""The Mamba-2 scan by mamba_ssm's Triton kernels: `ssd.ssd_reference`."""

from __future__ import annotations

from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor

from megatron_hybrid.ops.segments import number_documents
from megatron_hybrid.ops.ssd import check_heads


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
    chunk_length: int = 256,
) -> tuple[Tensor, Tensor]:
    """`ssd_reference` on a GPU in 16 bits, by chunks of `chunk_length` positions; decays and the walk over the states are fp32.

    Raises ValueError: H is not a multiple of G.
    """
    check_heads(x_BLHP.shape[2], B_BLGN.shape[2])
    return mamba_chunk_scan_combined(
        x_BLHP,
        dt_raw_BLH,
        -A_log_H.exp(),
        B_BLGN,
        C_BLGN,
        chunk_length,
        D=D_H,
        dt_bias=dt_bias_H,
        initial_states=initial_state_BHPN,
        seq_idx=None if segment_ids_BL is None else number_documents(segment_ids_BL).int(),
        dt_softplus=True,
        return_final_states=True,
    )
