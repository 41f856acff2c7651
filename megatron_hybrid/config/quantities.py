"""Numbers as people write them: "8.3B" tokens, "60%" of a run, "-380B" tokens before its end."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Annotated

from pydantic import BeforeValidator

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str | int | float) -> int:
    """Return a whole number written plainly or with a K, M, B or T suffix (powers of ten).

    >>> parse_count("8.3B"), parse_count("-380B"), parse_count(4096), parse_count("1e6")
    (8300000000, -380000000000, 4096, 1000000)

    Raises:
        ValueError: the text is no number, or does not come out whole.
    """
    if isinstance(text, bool):
        raise ValueError(f"expected a number such as 4096 or '8.3B', got {text!r}")
    digits = str(text).strip().replace("_", "")
    factor = 1
    if digits and digits[-1].upper() in _SUFFIXES:
        factor, digits = _SUFFIXES[digits[-1].upper()], digits[:-1]
    try:
        value = Decimal(digits) * factor
    except InvalidOperation:
        raise ValueError(f"expected a number such as 4096 or '8.3B', got {text!r}") from None
    if not value.is_finite() or value != value.to_integral_value():
        raise ValueError(f"expected a whole number, got {text!r}")
    return int(value)


def resolve_position(text: str | int, total: int) -> int:
    """Return the position named by ``text`` within a run of ``total`` tokens.

    "60%" is a share of the run, a negative count is measured back from its end, and any other count from its start.

    >>> resolve_position("60%", 1000), resolve_position("-380", 1000), resolve_position("1K", 5000)
    (600, 620, 1000)

    Raises:
        ValueError: the position lies outside the run.
    """
    written = str(text).strip()
    if written.endswith("%"):
        try:
            position = int(Decimal(written[:-1]) * total / 100)
        except (InvalidOperation, OverflowError, ValueError):
            raise ValueError(f"expected a share such as '60%', got {text!r}") from None
    else:
        position = parse_count(text)
        if position < 0:
            position += total
    if not 0 <= position <= total:
        raise ValueError(f"{text!r} lies outside a run of {total} tokens; give a share from '0%' to '100%' or a token count within the run")
    return position


def _check_position(text: str | int) -> str | int:
    if isinstance(text, str) and text.strip().endswith("%"):
        resolve_position(text, 100)
    else:
        parse_count(text)
    return text


TokenCount = Annotated[int, BeforeValidator(parse_count)]
"""A number of tokens, written plainly or as "8.3B"."""

RunPosition = Annotated[str | int, BeforeValidator(_check_position)]
"""A place in the run: a share ("60%"), a token count ("9T"), or a count back from the end ("-380B")."""
