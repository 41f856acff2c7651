"""The Mamba-2 core by mamba_ssm's one autograd function over causal_conv1d's and its own kernels: `mamba_core.mamba_core_reference`."""

from __future__ import annotations

from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined
from torch import Tensor

from megatron_hybrid.ops.libraries.causal_conv1d import check_convolution
from megatron_hybrid.ops.mamba_core import projection_sizes
from megatron_hybrid.ops.norm import check_groups
from megatron_hybrid.ops.segments import number_documents
from megatron_hybrid.ops.ssd import check_heads


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
    chunk_length: int = 256,
) -> Tensor:
    """`mamba_core_reference` on a GPU in 16 bits; the output projection, which the function could take in as well, stays outside.

    Raises ValueError: the sizes do not add up, the groups divide neither heads nor channels, or causal_conv1d takes no such convolution.
    """
    num_heads, inner, conv_weight_CW = A_log_H.shape[0], norm_weight_I.shape[0], conv_weight_CW.flatten(1)
    check_heads(num_heads, num_groups)
    check_groups(inner, num_groups)
    # The convolved channels stand behind the gate's, and are read where they stand.
    for num_channels in (inner, conv_weight_CW.shape[0]):
        check_convolution(num_channels, conv_weight_CW.shape[1])
    projection_sizes(zxBCdt_LBE.shape[-1], conv_weight_CW.shape[0], num_heads, inner, num_groups)
    out_BLI = mamba_split_conv1d_scan_combined(
        # Several sequences must lie one after another: of others it writes the gate's gradient into a copy, and loses it.
        zxBCdt_LBE.transpose(0, 1).contiguous(),
        conv_weight_CW,
        conv_bias_C,
        dt_bias_H,
        -A_log_H.exp(),
        D_H,
        chunk_length,
        seq_idx=None if segment_ids_BL is None else number_documents(segment_ids_BL).int(),
        activation="silu",
        rmsnorm_weight=norm_weight_I,
        rmsnorm_eps=eps,
        headdim=inner // num_heads,
        ngroups=num_groups,
        norm_before_gate=False,
    )
    return out_BLI.transpose(0, 1)
