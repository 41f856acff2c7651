"""What a checkpoint remembers of its targets, and what is said when a resumed run has others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vision_agglom.config.schema import VisionConfig
from vision_agglom.contract import TeacherFacts


def describe_data(run: VisionConfig, facts: Mapping[str, TeacherFacts], images: dict[str, Any]) -> dict[str, Any]:
    """What decides the samples (``images``) and the targets, as plain JSON."""
    teachers = {
        teacher.name: {
            "model": f"{teacher.library}:{teacher.model}:{teacher.weights}:{teacher.seed}:{teacher.output_scale}",
            "view": teacher.view,
            "standardizer": teacher.standardizer,
            "spatial_channels": facts[teacher.name].spatial_channels,
            "summary_channels": facts[teacher.name].summary_channels,
        }
        for teacher in run.teachers
    }
    return {"images": images, "teachers": teachers, "statistics": run.statistics.model_dump(mode="json")}


def require_same(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse other images, teachers or targets.

    Raises:
        ValueError: the message names what differs.
    """
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
    """Names under which both runs have the same model, however it is shown and normalised: what a head says of it goes on being true."""
    there, here = saved["teachers"], own["teachers"]
    return [name for name in here if name in there and there[name]["model"] == here[name]["model"]]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value
