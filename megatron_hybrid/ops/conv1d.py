"""Depthwise causal convolution with bias and SiLU in front of the Mamba-2 scan (Gu and Dao 2023, arXiv 2312.00752, section 3.4).

    y_t = silu(bias + sum_w weight[:, w] * x_{t - (W - 1) + w}),   positions before the sequence come from the state, or are zero.

Activations are channels-last, [B, L, C] in any strides: a transposed view of the model's [L, B, C] is read in place. The state for
decoding is the last W - 1 inputs, [B, W - 1, C], with zeros where the position belongs to an earlier document.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.ops.segments import number_documents


def causal_conv1d_reference(
    x_BLC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    *,
    segment_ids_BL: Tensor | None = None,
    initial_state_BTC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum above: every implementation named "causal_conv1d" takes these arguments and returns this pair.

    Args:
        x_BLC: inputs. weight_CW: W taps per channel, the last one on the present position. bias_C: or None.
        segment_ids_BL: integer document ids; no tap reaches across a change of id. The first document continues `initial_state_BTC`.
        initial_state_BTC: the T = W - 1 inputs before the first position; zero if None.

    Returns:
        y_BLC and the state after the last position [B, T, C], both in the dtype of x.
    """
    batch, length, num_channels = x_BLC.shape
    num_taps = weight_CW.shape[1]
    before = x_BLC.new_zeros(batch, num_taps - 1, num_channels) if initial_state_BTC is None else initial_state_BTC.to(x_BLC.dtype)
    padded = torch.cat((before, x_BLC), dim=1)
    document_BL = number_documents(torch.zeros_like(x_BLC[..., 0], dtype=torch.int64) if segment_ids_BL is None else segment_ids_BL)
    padded_document = F.pad(document_BL, (num_taps - 1, 0), value=0)
    total = torch.zeros_like(x_BLC) if bias_C is None else bias_C.to(x_BLC.dtype).expand_as(x_BLC)
    for w in range(num_taps):
        same_document = (padded_document[:, w : w + length] == document_BL)[..., None]
        total = total + weight_CW[:, w] * padded[:, w : w + length] * same_document
    in_last_document = (padded_document[:, length:] == document_BL[:, -1:])[..., None]
    return F.silu(total).to(x_BLC.dtype), padded[:, length:] * in_last_document


def causal_conv1d_step(state_BTC: Tensor, x_BC: Tensor, weight_CW: Tensor, bias_C: Tensor | None) -> tuple[Tensor, Tensor]:
    """One decoding step: `causal_conv1d_reference` at L = 1. Returns y [B, C] and the new state, leaving `state_BTC` as it was."""
    window_BWC = torch.cat((state_BTC, x_BC[:, None].to(state_BTC.dtype)), dim=1)
    total_BC = (window_BWC * weight_CW.t()).sum(1)
    y_BC = F.silu(total_BC if bias_C is None else total_BC + bias_C)
    return y_BC.to(x_BC.dtype), window_BWC[:, 1:]


def causal_conv1d(
    x_BLC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    *,
    segment_ids_BL: Tensor | None = None,
    initial_state_BTC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d_reference` as shifted row-wise additions in fp32 (fp64 for fp64), in the strides of x.

    The backward keeps x and recomputes the pre-activation.
    """
    document_BL = None if segment_ids_BL is None else number_documents(segment_ids_BL)
    y_BLC = _CausalConv1d.apply(x_BLC, weight_CW, bias_C, document_BL, initial_state_BTC)
    return y_BLC, last_inputs(x_BLC, weight_CW.shape[1] - 1, document_BL, initial_state_BTC)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x_BLC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_BL: Tensor | None, initial_BTC: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x_BLC, weight_CW, bias_C, document_BL, initial_BTC)
        return F.silu(_preactivation(_widen(x_BLC), weight_CW, bias_C, document_BL, initial_BTC), inplace=True).to(x_BLC.dtype)

    @staticmethod
    def backward(ctx, dy_BLC: Tensor) -> tuple[Tensor | None, ...]:
        x_BLC, weight_CW, bias_C, document_BL, initial_BTC = ctx.saved_tensors
        x_wide, tap_WC = _widen(x_BLC), _widen(weight_CW).t().contiguous()
        total = _preactivation(x_wide, weight_CW, bias_C, document_BL, initial_BTC)
        dtotal = torch.ops.aten.silu_backward(_widen(dy_BLC), total)
        dx = torch.mul(dtotal, tap_WC[-1])
        dtap_WC = torch.empty_like(tap_WC)
        dtap_WC[-1] = torch.mul(dtotal, x_wide, out=total).sum((0, 1))
        dinitial = None if initial_BTC is None else torch.zeros_like(initial_BTC, dtype=x_wide.dtype)
        for shift in range(1, tap_WC.shape[0]):
            tap = tap_WC[-1 - shift]
            reaching = _within_document(dtotal[:, shift:], document_BL, shift)
            dx[:, :-shift].addcmul_(reaching, tap)
            dtap_WC[-1 - shift] = torch.mul(reaching, x_wide[:, :-shift]).sum((0, 1))
            if initial_BTC is not None:
                head = _within_first_document(dtotal[:, :shift], document_BL)
                window = slice(initial_BTC.shape[1] - shift, initial_BTC.shape[1] - shift + head.shape[1])
                dinitial[:, window].addcmul_(head, tap)
                dtap_WC[-1 - shift] += (head * initial_BTC[:, window]).sum((0, 1))
        dbias = None if bias_C is None else dtotal.sum((0, 1)).to(bias_C.dtype)
        return (
            dx.to(x_BLC.dtype),
            dtap_WC.t().to(weight_CW.dtype),
            dbias,
            None,
            None if dinitial is None else dinitial.to(initial_BTC.dtype),
        )


def _preactivation(
    x_BLC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, document_BL: Tensor | None, initial_BTC: Tensor | None
) -> Tensor:
    tap_WC = _widen(weight_CW).t().contiguous()
    total = torch.mul(x_BLC, tap_WC[-1]) if bias_C is None else torch.addcmul(_widen(bias_C), x_BLC, tap_WC[-1])
    for shift in range(1, tap_WC.shape[0]):
        total[:, shift:].addcmul_(_within_document(x_BLC[:, :-shift], document_BL, shift), tap_WC[-1 - shift])
        if initial_BTC is not None:
            head = total[:, :shift]
            window = slice(initial_BTC.shape[1] - shift, initial_BTC.shape[1] - shift + head.shape[1])
            head.addcmul_(_within_first_document(_widen(initial_BTC[:, window]), document_BL), tap_WC[-1 - shift])
    return total


def _within_document(x_BLC: Tensor, document_BL: Tensor | None, shift: int) -> Tensor:
    """Zero the rows of a tensor shortened by `shift` whose two ends, `shift` positions apart, lie in different documents."""
    return x_BLC if document_BL is None else x_BLC * (document_BL[:, shift:] == document_BL[:, :-shift])[..., None]


def _within_first_document(head_BLC: Tensor, document_BL: Tensor | None) -> Tensor:
    return head_BLC if document_BL is None else head_BLC * (document_BL[:, : head_BLC.shape[1]] == 0)[..., None]


def last_inputs(x_BLC: Tensor, num_inputs: int, document_BL: Tensor | None, initial_BTC: Tensor | None) -> Tensor:
    """The state for decoding [B, num_inputs, C] after the last position; `document_BL` as `number_documents` gives it, or None."""
    num_kept = min(num_inputs, x_BLC.shape[1])
    kept = x_BLC[:, x_BLC.shape[1] - num_kept :]
    before = x_BLC.new_zeros(x_BLC.shape[0], num_inputs, x_BLC.shape[2]) if initial_BTC is None else initial_BTC.to(x_BLC.dtype)
    if document_BL is not None:
        kept = kept * (document_BL[:, x_BLC.shape[1] - num_kept :] == document_BL[:, -1:])[..., None]
        before = before * (document_BL[:, -1:] == 0)[..., None]
    return torch.cat((before[:, num_kept:], kept), dim=1)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
