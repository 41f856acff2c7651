"""What stands between the two projections of a Mamba-2 layer, as one operation: convolution, scan and gated norm.

    z, xBC, dt = zxBCdt;  x, B, C = causal_conv1d(xBC);  y = ssd(x, dt, A_log, B, C, D, dt_bias);  out = gated_rms_norm(y, z)

As one operation a fused version can keep the projection alone and write its whole gradient in place.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_hybrid.ops.conv1d import causal_conv1d, causal_conv1d_reference
from megatron_hybrid.ops.norm import gated_rms_norm, gated_rms_norm_reference
from megatron_hybrid.ops.ssd import ssd_reference
from megatron_hybrid.ops.ssd_chunked import ssd_chunked


def mamba_core_reference(
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
) -> Tensor:
    """The composition above: every implementation named "mamba_core" takes these arguments.

    Args:
        zxBCdt_LBE: the projection, E = I + C + H wide: gate z [I], convolved channels x [I], B and C [G N each], step sizes dt [H].
        conv_weight_CW, conv_bias_C: as `causal_conv1d_reference` takes them, C = I + 2 G N; the weight also as Conv1d keeps it, [C, 1, W].
        A_log_H, D_H, dt_bias_H: as `ssd_reference` takes them; I = H P.
        norm_weight_I: weight of the norm over G groups of channels.
        num_groups: G, of B and C and of the norm. eps: of the norm.
        segment_ids_BL: integer document ids; neither a tap nor the state crosses a change of id.

    Returns:
        [L, B, I] in the dtype of the projection.

    Raises:
        ValueError: the sizes do not add up to E, or G divides neither heads nor channels.
    """
    return _compose(
        causal_conv1d_reference,
        ssd_reference,
        gated_rms_norm_reference,
        zxBCdt_LBE,
        conv_weight_CW,
        conv_bias_C,
        A_log_H,
        D_H,
        dt_bias_H,
        norm_weight_I,
        num_groups=num_groups,
        eps=eps,
        segment_ids_BL=segment_ids_BL,
    )


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
    chunk_length: int = 64,
) -> Tensor:
    """`mamba_core_reference` from the fast versions in torch; `chunk_length` as `ssd_chunked` takes it."""

    def scan(*tensors: Tensor, segment_ids_BL: Tensor | None) -> tuple[Tensor, Tensor]:
        return ssd_chunked(*tensors, segment_ids_BL=segment_ids_BL, chunk_length=chunk_length)

    return _compose(
        causal_conv1d,
        scan,
        gated_rms_norm,
        zxBCdt_LBE,
        conv_weight_CW,
        conv_bias_C,
        A_log_H,
        D_H,
        dt_bias_H,
        norm_weight_I,
        num_groups=num_groups,
        eps=eps,
        segment_ids_BL=segment_ids_BL,
    )


def projection_sizes(width: int, num_channels: int, num_heads: int, inner: int, num_groups: int) -> tuple[list[int], list[int]]:
    """How zxBCdt divides into z, xBC and dt, and xBC into x, B and C. Raises ValueError where the sizes do not add up."""
    group_states = (num_channels - inner) // 2
    if width != inner + num_channels + num_heads or num_channels != inner + 2 * group_states or group_states % num_groups:
        raise ValueError(
            f"a projection {width} wide does not hold z [{inner}], x, B and C [{num_channels}] in {num_groups} groups and dt "
            f"[{num_heads}]; it must be the sum of the three, and x, B and C the norm's width and two equal parts that the groups divide"
        )
    return [inner, num_channels, num_heads], [inner, group_states, group_states]


def _compose(
    causal_conv1d: Callable,
    ssd: Callable,
    gated_rms_norm: Callable,
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
    segment_ids_BL: Tensor | None,
) -> Tensor:
    num_heads, inner = A_log_H.shape[0], norm_weight_I.shape[0]
    sizes, conv_sizes = projection_sizes(zxBCdt_LBE.shape[-1], conv_weight_CW.shape[0], num_heads, inner, num_groups)
    z_BLI, xBC_BLC, dt_BLH = zxBCdt_LBE.transpose(0, 1).split(sizes, dim=-1)
    xBC_BLC, _ = causal_conv1d(xBC_BLC, conv_weight_CW.flatten(1), conv_bias_C, segment_ids_BL=segment_ids_BL)
    x_BLI, B_BLS, C_BLS = xBC_BLC.split(conv_sizes, dim=-1)
    x_BLHP, B_BLGN, C_BLGN = (
        x_BLI.unflatten(-1, (num_heads, -1)),
        B_BLS.unflatten(-1, (num_groups, -1)),
        C_BLS.unflatten(-1, (num_groups, -1)),
    )
    y_BLHP, _ = ssd(x_BLHP, dt_BLH, A_log_H, B_BLGN, C_BLGN, D_H, dt_bias_H, segment_ids_BL=segment_ids_BL)
    return gated_rms_norm(y_BLHP.flatten(2), z_BLI, norm_weight_I, num_groups, eps).transpose(0, 1)
