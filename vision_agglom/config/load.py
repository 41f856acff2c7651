"""From a YAML file and dotted overrides to a checked distillation run, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_hybrid.config.errors import explain, nearest, refuse
from megatron_hybrid.config.load import apply_override, read_tree
from megatron_hybrid.config.yaml_text import format_yaml
from vision_agglom.config.schema import VisionConfig

_PRESETS = Path(__file__).with_name("presets")


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> VisionConfig:
    """Return the run that a YAML file and overrides describe.

    ``student`` may be a preset's name, or a mapping whose ``preset`` names one and whose other keys override it.

    Args:
        source: the YAML file.
        overrides: "a.b=value" each, applied in order; the value is YAML.

    Raises:
        ConfigError: the file cannot be read, or the run is not valid; the message lists every problem.
    """
    tree = read_tree(Path(source))
    if isinstance(tree.get("student"), str):
        tree["student"] = {"preset": tree["student"]}
    for override in overrides:
        apply_override(tree, override)
    if "student" in tree:
        tree["student"] = _resolve_preset(tree["student"], str(source))
    try:
        return VisionConfig.model_validate(tree)
    except ValidationError as error:
        raise refuse(str(source), explain(error, VisionConfig)) from None


def dump_config(config: VisionConfig) -> str:
    """Return the whole run as YAML, every default written out; ``load_config`` reads back an equal one."""
    return format_yaml(config.model_dump(mode="json"))


def student_preset_names() -> list[str]:
    """Return the names of the student presets, sorted."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def _resolve_preset(student: Any, source: str) -> Any:
    if isinstance(student, str):
        student = {"preset": student}
    if not isinstance(student, dict) or "preset" not in student:
        return student
    name = str(student["preset"])
    names = student_preset_names()
    if name not in names:
        raise refuse(source, [f"student.preset: no preset is called {name!r}{nearest(name, names)} (presets: {', '.join(names)})"])
    return read_tree(_PRESETS / f"{name}.yaml") | {key: value for key, value in student.items() if key != "preset"}
