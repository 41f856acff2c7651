"""The convolution in front of the scan by the causal_conv1d package: `conv1d.causal_conv1d_reference`."""

from __future__ import annotations

import torch
from causal_conv1d import causal_conv1d_fn
from torch import Tensor

from megatron_hybrid.ops.conv1d import last_inputs
from megatron_hybrid.ops.segments import number_documents

_ALIGNMENT, _ALIGNMENT_BYTES = 8, 16
"""Channels, and the strides between positions and sequences, are multiples of the one, addresses of the other."""


def causal_conv1d(
    x_BLC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    *,
    segment_ids_BL: Tensor | None = None,
    initial_state_BTC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d_reference` on a GPU; sums in fp32. Keeps x and recomputes the pre-activation.

    Raises ValueError: other than 2 to 4 taps, or channels that are no multiple of 8.
    """
    check_convolution(x_BLC.shape[2], weight_CW.shape[1])
    document_BL = None if segment_ids_BL is None else number_documents(segment_ids_BL)
    y_BCL = causal_conv1d_fn(
        _aligned(x_BLC).transpose(1, 2),
        weight_CW,
        bias_C,
        seq_idx=None if document_BL is None else document_BL.int(),
        initial_states=None if initial_state_BTC is None else initial_state_BTC.to(x_BLC.dtype).contiguous().transpose(1, 2),
        activation="silu",
    )
    return y_BCL.transpose(1, 2), last_inputs(x_BLC, weight_CW.shape[1] - 1, document_BL, initial_state_BTC)


def check_convolution(num_channels: int, num_taps: int) -> None:
    """Raise ValueError for a convolution that the package has no kernel for."""
    if not 2 <= num_taps <= 4:
        raise ValueError(f"causal_conv1d takes 2, 3 or 4 taps, got {num_taps}; set kernels.causal_conv1d and kernels.mamba_core to auto")
    if num_channels % _ALIGNMENT:
        raise ValueError(
            f"causal_conv1d takes channels in multiples of {_ALIGNMENT} on a rank, got {num_channels}; "
            "set kernels.causal_conv1d and kernels.mamba_core to auto"
        )


def _aligned(x_BLC: Tensor) -> Tensor:
    """The tensor itself where the kernels can read it, or a copy."""
    has_dense_channels = x_BLC.stride(2) == 1 and not any(stride % _ALIGNMENT for stride in x_BLC.stride()[:2])
    is_readable = has_dense_channels and x_BLC.data_ptr() % _ALIGNMENT_BYTES == 0
    return x_BLC if is_readable else x_BLC.clone(memory_format=torch.contiguous_format)
