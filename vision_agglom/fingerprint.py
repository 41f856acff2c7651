"""What a checkpoint remembers of its targets, and what is said when a resumed run has others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vision_agglom.config.schema import VisionConfig
from vision_agglom.contract import TeacherFacts

VERSION = 2
"""Of the record that ``describe_data`` makes. Raise it when the record's keys change; checkpoints of version 1 do not say theirs."""

_NOT_TARGETS = {"name", "slice_size", "spatial_loss", "spatial_weight", "summary_weight"}
"""Options of a teacher that leave its features, and what is gathered of them, as they are: it may be run and matched otherwise."""

_MODEL = ("library", "model", "pretrained", "weights", "revision", "options", "seed", "output_scale")
"""Options of a teacher that say which model it is."""


def describe_data(run: VisionConfig, facts: Mapping[str, TeacherFacts], images: dict[str, Any]) -> dict[str, Any]:
    """What decides the samples (``images``) and the targets, as plain JSON."""
    teachers = {
        teacher.name: teacher.model_dump(mode="json", exclude=_NOT_TARGETS)
        | {
            "spatial_channels": facts[teacher.name].spatial_channels,
            "summary_channels": facts[teacher.name].summary_channels,
        }
        for teacher in run.teachers
    }
    return {"version": VERSION, "images": images, "teachers": teachers, "statistics": run.statistics.model_dump(mode="json")}


def require_same(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse other images, teachers or targets.

    Raises:
        ValueError: the message names what differs, or says that another version of the project made the checkpoint.
    """
    other_version = _describe_other_version(saved, own)
    if other_version is not None:
        raise ValueError(
            f"{other_version}, so that its targets cannot be compared with this run's; finish the run with the version that began it, or "
            "start a new run from its weights (checkpoint.initialize_from)"
        )
    there, here = dict(_flatten(saved)), dict(_flatten(own))
    differences = [
        f"{name} is {there.get(name, '(not set)')!r} there and {here.get(name, '(not set)')!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differences:
        raise ValueError(
            f"the checkpoint was trained towards other targets: {'; '.join(differences)}; restore these options, or start a new run "
            "from its weights (checkpoint.initialize_from)"
        )


def same_teachers(saved: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """Names under which both runs have the same model, however it is shown and normalised: what a head says of it goes on being true.

    Empty where another version of the project made the checkpoint.
    """
    if _describe_other_version(saved, own) is not None:
        return []
    there, here = saved["teachers"], own["teachers"]
    return [name for name in here if name in there and all(there[name].get(key) == here[name][key] for key in _MODEL)]


def describe_new_spaces(saved: dict[str, Any], own: dict[str, Any]) -> str | None:
    """For a run that starts from saved weights: whose heads do not go on in the spaces they learned, and why; None where all do."""
    same = same_teachers(saved, own)
    others = [name for name in own["teachers"] if name not in same]
    if not others:
        return None
    reason = _describe_other_version(saved, own) or "the checkpoint has other models under these names, or none"
    return (
        f"the spaces of these teachers' heads are not taken over, each begins in that of its first targets: {', '.join(others)} ({reason})"
    )


def _describe_other_version(saved: dict[str, Any], own: dict[str, Any]) -> str | None:
    there, here = saved.get("version", 1), own["version"]
    if there == here:
        return None
    age = "an earlier" if there < here else "a later"
    return f"the checkpoint was made by {age} version of this project (its record of the targets has version {there}, not {here})"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value
