"""The gated, grouped RMSNorm by mamba_ssm's Triton kernel: `norm.gated_rms_norm_reference`."""

from __future__ import annotations

from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
from torch import Tensor

from megatron_hybrid.ops.norm import check_groups


def gated_rms_norm(y: Tensor, gate: Tensor, weight_D: Tensor, num_groups: int, eps: float) -> Tensor:
    """`gated_rms_norm_reference` on a GPU. Raises ValueError: the groups do not divide the channels."""
    check_groups(y.shape[-1], num_groups)
    group_size = y.shape[-1] // num_groups
    return rmsnorm_fn(y, weight_D, None, z=gate, eps=eps, group_size=group_size, norm_before_gate=False)
