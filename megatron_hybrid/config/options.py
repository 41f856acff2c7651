"""The options of a tree of sections, with their names, types and documentation."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Option:
    """One option, or one group of options."""

    path: tuple[str, ...]
    """Names from the root; an option inside a list has the list's name before its own."""
    annotation: Any
    """Its type as written in the schema."""
    field: FieldInfo
    """pydantic's record of it: default, bounds, docstring."""
    section: type[BaseModel] | None
    """The group that it is, or that it is a list of; None for a plain option."""

    @property
    def summary(self) -> str:
        """Its documentation, on one line; a group without documentation of its own has its type's."""
        text = self.field.description or (inspect.getdoc(self.section) if self.section else None)
        assert text, f"option {'.'.join(self.path)} is not documented"
        return " ".join(text.split())


def iterate_options(root: type[BaseModel], parent: tuple[str, ...] = ()) -> Iterator[Option]:
    """Yield every option and group under ``root`` in the order of the schema, each group before its options."""
    annotations = get_type_hints(root, include_extras=True)
    for name, field in root.model_fields.items():
        section = _find_section(annotations[name])
        yield Option((*parent, name), annotations[name], field, section)
        if section is not None:
            yield from iterate_options(section, (*parent, name))


def _find_section(annotation: Any) -> type[BaseModel] | None:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    found = (_find_section(argument) for argument in get_args(annotation))
    return next((section for section in found if section is not None), None)
