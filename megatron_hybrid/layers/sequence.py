"""What all layers of one forward pass share about the sequence, and what each carries from one piece of it to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sequence:
    """One micro-batch's sequences, whole on every rank."""

    offset: int = 0
    """Tokens already in the caches."""
    segment_ids_BL: Tensor | None = None
    """Document number of each token; None when documents are not kept apart."""
    attention_mask_B1LS: Tensor | None = None
    """True where attention may look, made once from segment_ids; None when every earlier token may be seen."""
    rope_cos_sin: tuple[Tensor, Tensor] | None = None
    """Rotary tables for the positions from ``offset`` on; None without position embedding."""
    num_valid_B: Tensor | None = None
    """int64, how many of each sequence's tokens in this piece are tokens; padding after them leaves the caches' states as they were. None:
    all. A padded sequence has no later piece with tokens."""


@dataclass
class MambaCache:
    """The state of a Mamba-2 layer between two tokens of each sequence; updated in place."""

    conv_ring_BWC: Tensor
    """The last inputs of the convolution, as many as its taps, in the working precision; that of position p lies at p % W, so that a step
    writes one row and moves none. Positions before the first are zeros."""
    ssm_state_BHPN: Tensor
    """fp32."""

    def rows(self, first: int, end: int) -> MambaCache:
        """The same memory, of sequences ``first`` to ``end`` (exclusive)."""
        return MambaCache(self.conv_ring_BWC[first:end], self.ssm_state_BHPN[first:end])

    def reset(self) -> None:
        """Go back to before the first token."""
        self.conv_ring_BWC.zero_()
        self.ssm_state_BHPN.zero_()

    def recent_inputs(self, offset: int) -> Tensor:
        """The W - 1 inputs before position ``offset``, [B, W - 1, C]."""
        return self.conv_ring_BWC[:, self._slots(torch.tensor(offset, device=self.conv_ring_BWC.device))]

    def keep_inputs(self, recent_BTC: Tensor, end_B: Tensor) -> None:
        """Take in the W - 1 inputs before position ``end`` of each sequence (int64 [B])."""
        slots_BT1 = self._slots(end_B[:, None])[..., None]
        self.conv_ring_BWC.scatter_(1, slots_BT1.expand_as(recent_BTC), recent_BTC)

    def _slots(self, end: Tensor) -> Tensor:
        num_taps = self.conv_ring_BWC.shape[1]
        return (end - num_taps + 1 + torch.arange(num_taps - 1, device=end.device)) % num_taps


@dataclass
class AttentionCache:
    """Keys and values seen so far, in buffers of the longest length; written in place."""

    key_BSGP: Tensor
    value_BSGP: Tensor

    def rows(self, first: int, end: int) -> AttentionCache:
        """The same memory, of sequences ``first`` to ``end`` (exclusive)."""
        return AttentionCache(self.key_BSGP[first:end], self.value_BSGP[first:end])

    def reset(self) -> None:
        """Nothing to do: what was there before is never read."""

    def extend(self, key_BLGP: Tensor, value_BLGP: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Write L new tokens behind the first ``offset`` ones and return all that is there, [B, offset + L, G, P]."""
        end = offset + key_BLGP.shape[1]
        assert end <= self.key_BSGP.shape[1], (end, self.key_BSGP.shape)
        self.key_BSGP[:, offset:end] = key_BLGP
        self.value_BSGP[:, offset:end] = value_BLGP
        return self.key_BSGP[:, :end], self.value_BSGP[:, :end]


Cache = MambaCache | AttentionCache | None
"""What a layer carries; None for a layer whose tokens do not meet."""
