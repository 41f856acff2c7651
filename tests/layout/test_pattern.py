"""Patterns are Megatron's: M, *, - per layer, | between stages, and nothing else."""

from __future__ import annotations

import pytest

from megatron_hybrid.layout.pattern import count_kinds, parse_pattern


@pytest.mark.parametrize(
    ("pattern", "segments"),
    [
        ("M", ("M",)),
        ("M-M*-", ("M-M*-",)),
        ("M-|M*-", ("M-", "M*-")),
        ("*|*|*", ("*", "*", "*")),
        ("M---MM*--", ("M---MM*--",)),
    ],
)
def test_segments_are_what_stands_between_cuts(pattern: str, segments: tuple[str, ...]) -> None:
    assert parse_pattern(pattern) == segments
    assert "|".join(segments) == pattern


@pytest.mark.parametrize(
    ("pattern", "character", "position"),
    [("MXM", "'X'", 2), ("m", "'m'", 1), ("M-M E", "' '", 4), ("M*-/", "'/'", 4), ("M\n", r"'\\n'", 2)],
)
def test_any_other_character_is_refused_with_its_position(pattern: str, character: str, position: int) -> None:
    with pytest.raises(ValueError, match=rf"{character} at position {position} of {len(pattern)}"):
        parse_pattern(pattern)


@pytest.mark.parametrize(("pattern", "number"), [("|M", 1), ("M|", 2), ("M||M", 2), ("|", 1)])
def test_an_empty_segment_is_refused(pattern: str, number: int) -> None:
    with pytest.raises(ValueError, match=f"segment {number} of .* is empty"):
        parse_pattern(pattern)


def test_an_empty_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="pattern is empty"):
        parse_pattern("")


def test_counts_leave_out_stage_cuts() -> None:
    assert count_kinds("M-M*|-M-") == {"M": 3, "*": 1, "-": 3}
