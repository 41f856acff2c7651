"""YAML as people mean it: the YAML 1.2 core types, and no key twice.

PyYAML follows YAML 1.1, where 1e-4 is text, `no` is false, 12:30 is 750 and a repeated key silently wins. What is written here is read back
as the same values, because both directions use one table of types.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from megatron_hybrid.config.errors import refuse

# First characters, tag and form of each plain scalar that is not text (YAML 1.2.2, section 10.3.2). Octal and hexadecimal numbers, and
# those with leading zeros, stay text: no option is meant so.
_CORE_TYPES = (
    (("~", "n", "N", ""), "null", r"~|null|Null|NULL|"),
    (tuple("tTfF"), "bool", r"true|True|TRUE|false|False|FALSE"),
    (tuple("-+0123456789"), "int", r"[-+]?(0|[1-9][0-9]*)"),
    (tuple("-+.0123456789"), "float", r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)|\.nan"),
)


def parse_yaml(text: str, source: str) -> Any:
    """Return the value that ``text`` describes.

    Args:
        text: one YAML document.
        source: what an error calls it, such as the file's name.

    Raises:
        ConfigError: the text is no YAML, or a mapping has a key twice; the message has the line.
    """
    try:
        return yaml.load(text, _CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise refuse(source, [f"{line}{error.problem or error.context}"]) from None
    except yaml.YAMLError as error:
        raise refuse(source, [f"not readable as YAML: {error}"]) from None


def format_yaml(value: Any) -> str:
    """Return ``value`` as YAML that ``parse_yaml`` reads back equal; mappings keep their order."""
    return yaml.dump(value, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True)


def _core_resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Return PyYAML's table of plain scalars: first character ('' for an empty one) -> tags and the forms they take."""
    resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for characters, name, form in _CORE_TYPES:
        for character in characters:
            resolvers.setdefault(character, []).append((f"tag:yaml.org,2002:{name}", re.compile(f"(?:{form})$")))
    return resolvers


class _CoreLoader(yaml.SafeLoader):
    yaml_implicit_resolvers = _core_resolvers()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first_lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            line = key_node.start_mark.line + 1
            if key is not None and key in first_lines:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice, first on line {first_lines[key]}", key_node.start_mark
                )
            first_lines[key] = line
        return super().construct_mapping(node, deep)


class _CoreDumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _CoreLoader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True
