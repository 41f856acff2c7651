"""The reference of all options, docs/configuration.md, written from the schema."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_hybrid.config.load import load_model, preset_names
from megatron_hybrid.config.options import Option, iterate_options
from megatron_hybrid.config.quantities import RunPosition, TokenCount
from megatron_hybrid.config.schema import RunConfig
from megatron_hybrid.layout.flops import training_flops_per_token
from megatron_hybrid.layout.parameters import num_parameters
from megatron_hybrid.layout.pattern import KIND_NAMES, count_kinds

_INTRODUCTION = """\
# Configuration

Written from the classes in `megatron_hybrid/config/` by `megatron_hybrid.config.reference.option_table`; a test keeps it up to date.

A run is one YAML file plus overrides on the command line, applied in order:

    python -m megatron_hybrid pretrain run.yaml parallel.tensor=2 train.steps=200 'data.sources={web: corpus/web, code: corpus/code}'

- A name is the path of the option, with dots; items of a list go by number from 0 (`data.phases.0.start=0`). A value is YAML:
  lists are written `[1, 2]`, and `null` unsets an option.
- `model` is a preset's name (`model: nemotron-h-8b`), or a mapping that may name one and override it (`model: {preset: nemotron-h-8b,
  mamba_chunk_size: 256}`; `model.mamba_chunk_size=256` does the same from the command line).
- Token counts may have a suffix: `8.3B` is 8,300,000,000 tokens (K, M, B and T are powers of ten). Places in the run may also be shares
  (`60%`), or counts back from the end (`-380B`).
- YAML is read with the core types of version 1.2: `1e-4` is a number, `no` is text, and a key given twice is an error.
- An option that does not exist is an error, and so is a value of the wrong kind; all errors of a file are reported together.
"""

_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def option_table() -> str:
    """Return the reference as Markdown: presets, then every option with its type, default and documentation."""
    options = list(iterate_options(RunConfig))
    groups = [option for option in options if option.section is not None]
    top = [option for option in options if len(option.path) == 1 and option.section is None]
    parts = [_INTRODUCTION, "## Presets\n", *_preset_rows(), "\n## Of the run itself\n", *_option_rows(top)]
    for group in groups:
        members = [option for option in options if option.path[:-1] == group.path]
        parts += [f"\n## {'.'.join(group.path)}\n", f"{_group_text(group)}\n", *_option_rows(members)]
    return "\n".join(parts) + "\n"


def _group_text(group: Option) -> str:
    about = " ".join((inspect.getdoc(group.section) or "").split())
    return f"{about} Required." if group.field.is_required() else about


def _preset_rows() -> Iterator[str]:
    yield "| preset | layers | parameters | training FLOPs per token at 8,192 |"
    yield "|---|---|---|---|"
    for name in preset_names():
        model, _, sequence_length = load_model(name)
        layers = ", ".join(f"{count} {KIND_NAMES[kind]}" for kind, count in count_kinds(model.layer_kinds).items())
        yield f"| `{name}` | {layers} | {num_parameters(model):,} | {training_flops_per_token(model, sequence_length) / 1e9:,.2f} G |"


def _option_rows(options: list[Option]) -> Iterator[str]:
    yield "| option | type | default | meaning |"
    yield "|---|---|---|---|"
    for option in options:
        cells = (f"`{option.path[-1]}`", _type_text(option), _default_text(option.field), option.summary)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _type_text(option: Option) -> str:
    bounds = [f"{word} {getattr(bound, name)}" for bound in option.field.metadata for name, word in _BOUNDS.items() if hasattr(bound, name)]
    return ", ".join([_annotation_text(option.annotation), *bounds])


def _annotation_text(annotation: Any) -> str:
    plain = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text", Path: "path", NoneType: "`null`"}
    plain |= {TokenCount: "token count", RunPosition: "place in the run"}
    if annotation in plain:
        return plain[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{str(value).lower()}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_annotation_text(argument) for argument in arguments)
    if origin is tuple:
        plural = "" if get_origin(arguments[0]) is Literal else "s"
        return f"list of {_annotation_text(arguments[0])}{plural}"
    if origin is dict:
        return f"mapping of name to {_annotation_text(arguments[1])}"
    return "group"


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "unset"
    if isinstance(default, (bool, int, float, str)):
        return f"`{str(default).lower() if isinstance(default, bool) else default}`"
    if isinstance(default, BaseModel):
        return "its defaults"
    if isinstance(default, tuple) and all(isinstance(item, str) for item in default):
        return ", ".join(f"`{item}`" for item in default)
    if isinstance(default, tuple):
        return "one, with its defaults"
    assert default == {}, f"no way to write the default {default!r}"
    return "empty"
