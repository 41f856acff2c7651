"""Numbers as people write them."""

from __future__ import annotations

import pytest

from megatron_hybrid.config.quantities import parse_count, resolve_position


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("1_000", 1000),
        ("1e6", 10**6),
        (1e6, 10**6),
        ("1k", 1000),
        ("2.5M", 2_500_000),
        ("8.3B", 8_300_000_000),
        ("15T", 15 * 10**12),
        ("-380B", -380 * 10**9),
    ],
)
def test_counts(text: str | int | float, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "B", "many", "1.5", 0.5, "1.23456K", True, None, "nan", "inf", [1]])
def test_what_is_no_whole_number_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a"):
        parse_count(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "position"), [("0%", 0), ("60%", 600), ("100%", 1000), ("33.3%", 333), ("-380", 620), (5, 5), ("1K", 1000)]
)
def test_positions(text: str | int, position: int) -> None:
    assert resolve_position(text, 1000) == position


@pytest.mark.parametrize("text", ["101%", "-1%", "1001", "-1001", "x%", "%", "inf%", "nan%"])
def test_positions_outside_the_run_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="lies outside a run|expected a share"):
        resolve_position(text, 1000)
