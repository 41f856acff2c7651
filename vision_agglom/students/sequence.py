"""What all blocks of one forward pass share about the sequence of tokens: class tokens, registers, then patches row by row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageSequence:
    """The tokens of a micro-batch, all images of one size.

    Sequence parallelism cuts the sequence evenly, and no number of patches can be relied on for that: tokens without meaning fill it up at
    its end. Attention leaves them out; what they hold reaches no other token.
    """

    num_prefix: int
    """Class and register tokens."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    multiple: int = 1
    """The padded length is a multiple of this."""
    window: int | None = None
    """Side in patches of the windows of windowed blocks; None where all blocks are global."""
    step: int = 0
    """The optimizer step, which DAMP's noise is drawn for."""

    @property
    def length(self) -> int:
        """Tokens that mean something."""
        return self.num_prefix + self.grid[0] * self.grid[1]

    @property
    def padded_length(self) -> int:
        """Tokens in the residual stream."""
        return -(-self.length // self.multiple) * self.multiple
