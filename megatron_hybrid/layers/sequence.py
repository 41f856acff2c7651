"""What all layers of one forward pass share about the sequence, and what each carries from one piece of it to the next."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass
class MambaCache:
    """The state of a Mamba-2 layer between two pieces of a sequence."""

    conv_state_BTC: Tensor
    """The last inputs of the convolution, one fewer than its taps, in the working precision."""
    ssm_state_BHPN: Tensor
    """fp32."""


@dataclass
class AttentionCache:
    """Keys and values seen so far, in buffers of the longest length."""

    key_BSGP: Tensor
    value_BSGP: Tensor

    def extend(self, key_BLGP: Tensor, value_BLGP: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Write L new tokens behind the first ``offset`` ones and return all that is there, [B, offset + L, G, P]."""
        end = offset + key_BLGP.shape[1]
        assert end <= self.key_BSGP.shape[1], (end, self.key_BSGP.shape)
        self.key_BSGP[:, offset:end] = key_BLGP
        self.value_BSGP[:, offset:end] = value_BLGP
        return self.key_BSGP[:, :end], self.value_BSGP[:, :end]
