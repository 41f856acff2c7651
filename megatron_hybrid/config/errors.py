"""What a user is told about a configuration that cannot be used: the dotted name, what was expected, what was given."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_hybrid.config.options import Option, iterate_options

_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number not below {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "a number below {lt}",
    "literal_error": "{expected}",
    "model_type": "a group of options",
    "path_type": "a path",
    "string_type": "text",
    "too_short": "at least {min_length} of them",
    "tuple_type": "a list",
}


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names every problem found, one per line."""


def refuse(source: str, problems: Iterable[str]) -> ConfigError:
    """Return the error that says what is wrong with ``source``, which is a file, a preset or an override."""
    return ConfigError("\n".join([f"cannot use {source}:", *(f"  {problem}" for problem in problems)]))


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Return one line per problem that pydantic found in a tree of type ``root``."""
    options = {option.path: option for option in iterate_options(root)}
    found = error.errors()
    return [_explain_one(details, options) for details in found if not _follows_from_items(details, found)]


def nearest(name: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """Return "; did you mean 'X'?" for the name most like ``name``, or nothing where none shares as much of its letters (``difflib``'s
    ratio)."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=likeness)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _follows_from_items(details: ErrorDetails, found: list[ErrorDetails]) -> bool:
    """Whether a list is called too short only because pydantic does not count the items that it refused."""
    place = details["loc"]
    return details["type"] == "too_short" and any(each["loc"][: len(place)] == place != each["loc"] for each in found)


def _explain_one(details: ErrorDetails, options: dict[tuple[str, ...], Option]) -> str:
    kind = details["type"]
    location = tuple(str(part) for part in details["loc"])
    name = ".".join(location)
    # Options below a list have its index in their location, and none in the path of their documentation.
    path = tuple(part for part in details["loc"] if isinstance(part, str))
    if kind == "extra_forbidden":
        return f"unknown option {name!r}{_nearest_option(location, path, options)}"
    if kind == "missing":
        return f"missing option {name!r}: {options[path].summary}"
    if kind == "value_error":
        message = str(details["ctx"]["error"])
        return f"{name}: {message}" if name else message
    if kind in _EXPECTED:
        return f"{name}: expected {_EXPECTED[kind].format(**details.get('ctx', {}))}, got {_shorten(details['input'])}"
    return f"{name}: {details['msg']}, got {_shorten(details['input'])}"


def _nearest_option(location: tuple[str, ...], path: tuple[str, ...], options: dict[tuple[str, ...], Option]) -> str:
    """Look for the name beside the unknown one first, then for the same last word anywhere."""
    siblings = [known[-1] for known in options if known[:-1] == path[:-1]]
    matches = difflib.get_close_matches(path[-1], siblings, n=1)
    if matches:
        return f"; did you mean {'.'.join((*location[:-1], matches[0]))!r}?"
    elsewhere = [".".join(known) for known in options if known[-1] == path[-1]]
    return f"; did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else ""


def _shorten(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
