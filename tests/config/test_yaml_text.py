"""YAML means what its 1.2 core types say, in both directions, and says where it is broken."""

from __future__ import annotations

import math

import pytest

from megatron_hybrid.config.errors import ConfigError
from megatron_hybrid.config.yaml_text import format_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("3.", 3.0),
        (".inf", math.inf),
        ("0", 0),
        ("-12", -12),
        ("010", "010"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("true", True),
        ("FALSE", False),
        ("no", "no"),
        ("on", "on"),
        ("null", None),
        ("~", None),
        ("", None),
        ("8.3B", "8.3B"),
        ("60%", "60%"),
        ("M-M*-M-|M-", "M-M*-M-|M-"),
        ("'1e-4'", "1e-4"),
        ("[1, 2.0, x]", [1, 2.0, "x"]),
        ("{no: 1, b: {c: }}", {"no": 1, "b": {"c": None}}),
    ],
)
def test_plain_scalars_have_core_types(text: str, value: object) -> None:
    parsed = parse_yaml(text, "test")
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "text",
    ["1e5", "1e-4", "no", "12:30", "010", "true", "null", "", "~", ".5", "-", "*-M", "- a", "a: b", "# x", " x ", "60%", "M|\n", "\u00e9"],
)
def test_text_is_written_so_that_it_stays_text(text: str) -> None:
    assert parse_yaml(format_yaml({text: [text]}), "test") == {text: [text]}


@pytest.mark.parametrize("number", [0, -3, 1e-5, 1e300, 0.1, 5.0, -math.inf, 123456789012345678901])
def test_numbers_are_written_exactly(number: float) -> None:
    parsed = parse_yaml(format_yaml([number]), "test")
    assert parsed == [number] and type(parsed[0]) is type(number)


def test_a_repeated_key_is_refused_with_both_lines() -> None:
    with pytest.raises(ConfigError, match=r"run.yaml:\n  line 4: key 'lr' is given twice, first on line 2"):
        parse_yaml("optimizer:\n  lr: 1\n  beta1: 0.9\n  lr: 2\n", "run.yaml")


def test_the_same_key_in_different_mappings_is_fine() -> None:
    assert parse_yaml("a: {x: 1}\nb: {x: 2}\n", "test") == {"a": {"x": 1}, "b": {"x": 2}}


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: 1\nb: [1, 2\nc: 3\n", 3), ("a: 1\n\tb: 2\n", 2), ("a: 1\n---\nb: 2\n", 2), ("a: *x\n", 1), ("? [a]\n: 1\n", 1)],
)
def test_broken_text_is_refused_with_its_line(text: str, line: int) -> None:
    with pytest.raises(ConfigError, match=rf"run.yaml:\n  line {line}: \w+"):
        parse_yaml(text, "run.yaml")


def test_a_control_character_is_refused() -> None:
    with pytest.raises(ConfigError, match="not readable as YAML"):
        parse_yaml("a: \x00", "run.yaml")
