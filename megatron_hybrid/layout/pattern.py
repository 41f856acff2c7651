"""The layer pattern: one character per layer, as Nemotron-H and Megatron write it."""

from __future__ import annotations

from typing import Final

MAMBA: Final = "M"
ATTENTION: Final = "*"
MLP: Final = "-"
STAGE_CUT: Final = "|"

LAYER_KINDS: Final = (MAMBA, ATTENTION, MLP)
"""Every kind of layer, in the order in which tables list them."""

KIND_NAMES: Final = {MAMBA: "mamba", ATTENTION: "attention", MLP: "mlp"}


def parse_pattern(pattern: str) -> tuple[str, ...]:
    """Return the segments of layers between the stage cuts.

    >>> parse_pattern("M-M-|M*-")
    ('M-M-', 'M*-')

    Raises:
        ValueError: the pattern is empty, has an empty segment, or has a character that names no layer kind.
    """
    if not pattern:
        raise ValueError("the layer pattern is empty; give one character per layer: M (Mamba-2), * (attention), - (MLP)")
    for position, character in enumerate(pattern, start=1):
        if character not in (*LAYER_KINDS, STAGE_CUT):
            raise ValueError(
                f"layer pattern has {character!r} at position {position} of {len(pattern)}; "
                "expected M (Mamba-2), * (attention), - (MLP) or | (pipeline-stage cut)"
            )
    segments = tuple(pattern.split(STAGE_CUT))
    if "" in segments:
        number = segments.index("") + 1
        raise ValueError(f"segment {number} of {len(segments)} in layer pattern {pattern!r} is empty; every | needs a layer on both sides")
    return segments


def count_kinds(layers: str) -> dict[str, int]:
    """Return how many layers of each kind ``layers`` has, in the order of LAYER_KINDS; stage cuts are not counted."""
    return {kind: layers.count(kind) for kind in LAYER_KINDS}
