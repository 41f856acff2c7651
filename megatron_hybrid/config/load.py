"""From a YAML file and dotted overrides to a checked configuration, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError, model_validator

from megatron_hybrid.config.errors import ConfigError, explain, nearest, refuse
from megatron_hybrid.config.float8 import Fp8Config
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.schema import ParallelConfig, RunConfig, check_layout
from megatron_hybrid.config.section import Section
from megatron_hybrid.config.yaml_text import format_yaml, parse_yaml
from megatron_hybrid.layout.float8 import plan_float8

_PRESETS = Path(__file__).with_name("presets")

_SectionT = TypeVar("_SectionT", bound=Section)


class SampleConfig(Section):
    """The part of the data that a model's arithmetic depends on."""

    sequence_length: int = Field(8192, gt=0)
    """Tokens per training sample."""


class PresetConfig(Section):
    """A preset in a layout: what there is to say about a model before there is a run."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: SampleConfig = SampleConfig()
    fp8: Fp8Config = Fp8Config()

    @model_validator(mode="after")
    def _check(self) -> PresetConfig:
        check_layout(self.model, self.parallel, self.data.sequence_length)
        if self.fp8.recipe != "off":
            plan_float8(self.model, self.parallel.tensor, self.fp8)
        return self


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run that a YAML file and overrides describe.

    ``model`` may be a preset's name, or a mapping whose ``preset`` names one and whose other keys override it.

    Args:
        source: the YAML file.
        overrides: "a.b=value" each, applied in order; the value is YAML, so a list is written "[1, 2]".

    Raises:
        ConfigError: the file cannot be read, or the run is not valid; the message lists every problem.
    """
    return _build(RunConfig, read_tree(Path(source)), overrides, str(source))


def load_section(section: type[_SectionT], source: str | Path, overrides: Sequence[str] = ()) -> _SectionT:
    """Return what a YAML file and overrides describe, for a tool whose options are another tree than a run's.

    Raises:
        ConfigError: as ``load_config``.
    """
    return _build(section, read_tree(Path(source)), overrides, str(source))


def load_layout(source: str | Path, overrides: Sequence[str] = ()) -> PresetConfig:
    """Return what a preset (at 8,192 tokens if no override says otherwise) or a run's YAML file says of a model in a layout.

    Raises:
        ConfigError: there is no such preset or file, or it is not valid.
    """
    if str(source) in preset_names():
        return _build(PresetConfig, {"model": str(source)}, overrides, f"preset {source}")
    if Path(source).suffix in (".yaml", ".yml") or Path(source).exists():
        run = load_config(source, overrides)
        sample = SampleConfig(sequence_length=run.data.sequence_length)
        return PresetConfig(model=run.model, parallel=run.parallel, data=sample, fp8=run.fp8)
    raise refuse(str(source), [f"neither a file nor a preset{_preset_hint(str(source))}"])


def load_model(source: str | Path, overrides: Sequence[str] = ()) -> tuple[ModelConfig, ParallelConfig, int]:
    """Return model, layout and sequence length alone of ``load_layout``."""
    config = load_layout(source, overrides)
    return config.model, config.parallel, config.data.sequence_length


def dump_config(config: RunConfig) -> str:
    """Return the whole run as YAML, every default written out; ``load_config`` reads back an equal one."""
    return format_yaml(config.model_dump(mode="json"))


def preset_names() -> list[str]:
    """Return the names of the presets, sorted."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def _build(section: type[_SectionT], tree: dict[str, Any], overrides: Sequence[str], source: str) -> _SectionT:
    for override in overrides:
        apply_override(tree, override)
    if "model" in tree:
        tree["model"] = _resolve_preset(tree["model"], source)
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise refuse(source, explain(error, section)) from None


def read_tree(path: Path) -> dict[str, Any]:
    """Return the options of a YAML file, unchecked.

    Raises:
        ConfigError: it cannot be read, or holds something else than options.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise refuse(str(path), [f"{error.strerror}; expected a YAML file"]) from None
    except UnicodeDecodeError as error:
        raise refuse(str(path), [f"not text in UTF-8: {error.reason} at byte {error.start}"]) from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise refuse(str(path), ["expected a mapping of options such as 'train:'"])
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one option of ``tree``, given as "a.b=value" with the value in YAML; an item of a list goes by its number, "a.0.b=value".

    Raises:
        ConfigError: it is not of that form, names something below a plain value, or an item that a list does not have.
    """
    name, equals, text = override.partition("=")
    parts = name.split(".")
    if not equals or "" in parts:
        raise refuse(f"override {override!r}", ["expected NAME=VALUE, such as parallel.tensor=2"])
    try:
        value = parse_yaml(text, "the value")
    except ConfigError:
        quoted = f"{name}='\"{text}\"'"
        raise refuse(f"override {override!r}", [f"the value is not valid YAML; if it is meant as text, quote it: {quoted}"]) from None
    group: Any = tree
    for depth, part in enumerate(parts, start=1):
        key = _key_below(group, part, parts[: depth - 1], override)
        if depth == len(parts):
            group[key] = value
            return
        below = group[key] if isinstance(group, list) else group.get(key)
        if depth == 1 and part == "model" and isinstance(below, str):
            below = {"preset": below}
        if below is None:
            below = {}
        group[key] = below
        group = below


def _key_below(group: Any, part: str, above: list[str], override: str) -> str | int:
    """``part`` as a key of what stands at ``above``: a name in a mapping, a number in a list."""
    where = ".".join(above)
    if isinstance(group, dict):
        return part
    if not isinstance(group, list):
        raise refuse(f"override {override!r}", [f"{where!r} holds {group!r} and has no options below it"])
    if not part.isdecimal() or int(part) >= len(group):
        numbers = f"a number from 0 to {len(group) - 1}" if group else "no number, since it is empty"
        raise refuse(
            f"override {override!r}", [f"{where!r} is a list: expected {numbers}, got {part!r}; or give it as a whole: {where}=[...]"]
        )
    return int(part)


def _resolve_preset(model: Any, source: str) -> Any:
    """Return the model's options with those of the preset it names filled in; anything but a mapping or a name is left to validation."""
    if isinstance(model, str):
        model = {"preset": model}
    if not isinstance(model, dict) or "preset" not in model:
        return model
    name = model["preset"]
    if name not in preset_names():
        raise refuse(source, [f"model.preset: no preset is called {name!r}{_preset_hint(str(name))}"])
    options = {key: value for key, value in model.items() if key != "preset"}
    return read_tree(_PRESETS / f"{name}.yaml") | options


def _preset_hint(name: str) -> str:
    return f"{nearest(name, preset_names())} (presets: {', '.join(preset_names())})"
