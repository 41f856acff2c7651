"""What a checkpoint remembers of its teachers: every option that changes the targets, and none that leaves them as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.vision_agglom.small import FACTS, small_vision_run
from vision_agglom.config.distill import DistilledTeacherConfig
from vision_agglom.config.schema import VisionConfig
from vision_agglom.fingerprint import VERSION, describe_data, describe_new_spaces, require_same, same_teachers

CHANGES: dict[str, Any] = {
    "library": "transformers",
    "model": "other",
    "pretrained": True,
    "weights": "dfn5b",
    "revision": "v1.0",
    "options": {"num_layers": 1},
    "seed": 2,
    "output_scale": 3.0,
    "resolution": 56,
    "sides": "any",
    "resize_input": True,
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
    "summary": "none",
    "view": "own",
    "standardizer": "zca",
    "summary_loss": "cosine",
}
"""A change of each option that decides targets, of a teacher that has another value there."""

HARMLESS: dict[str, Any] = {"slice_size": 4, "spatial_loss": "cosine_smooth_l1", "spatial_weight": 2.0, "summary_weight": 2.0}


def with_first_teacher(run: VisionConfig, **changes: Any) -> VisionConfig:
    """Unchecked, so that each option can be changed alone."""
    return run.model_copy(update={"teachers": (run.teachers[0].model_copy(update=changes), *run.teachers[1:])})


def saved(run: VisionConfig) -> dict[str, Any]:
    """As a checkpoint gives it back."""
    return json.loads(json.dumps(describe_data(run, FACTS, {"seed": 1})))


@pytest.fixture
def run(tmp_path: Path) -> VisionConfig:
    return with_first_teacher(small_vision_run(tmp_path), options={"num_layers": 2, "table_side": 8})


def test_the_same_teachers_are_taken(run: VisionConfig) -> None:
    require_same(saved(run), describe_data(run, FACTS, {"seed": 1}))


@pytest.mark.parametrize("option", CHANGES)
def test_another_target_is_refused_by_name(option: str, run: VisionConfig) -> None:
    other = with_first_teacher(run, **{option: CHANGES[option]})
    with pytest.raises(ValueError, match=rf"teachers\.clip\.{option}\b.* there and .* here"):
        require_same(saved(run), describe_data(other, FACTS, {"seed": 1}))


@pytest.mark.parametrize("option", HARMLESS)
def test_what_leaves_targets_as_they_are_may_change(option: str, run: VisionConfig) -> None:
    other = with_first_teacher(run, **{option: HARMLESS[option]})
    require_same(saved(run), describe_data(other, FACTS, {"seed": 1}))


def test_every_option_is_one_or_the_other() -> None:
    assert set(CHANGES) | set(HARMLESS) | {"name"} == set(DistilledTeacherConfig.model_fields)


@pytest.mark.parametrize(("option", "is_same"), [("options", False), ("revision", False), ("view", True), ("standardizer", True)])
def test_heads_are_kept_for_the_same_model_however_it_is_shown(option: str, is_same: bool, run: VisionConfig) -> None:
    other = describe_data(with_first_teacher(run, **{option: CHANGES[option]}), FACTS, {"seed": 1})
    assert ("clip" in same_teachers(saved(run), other)) == is_same
    assert "dino" in same_teachers(saved(run), other)


def test_heads_that_begin_anew_are_named(run: VisionConfig) -> None:
    other = describe_data(with_first_teacher(run, revision="v1.0"), FACTS, {"seed": 1})
    assert describe_new_spaces(saved(run), describe_data(run, FACTS, {"seed": 1})) is None
    message = describe_new_spaces(saved(run), other)
    assert message is not None and "of its first targets: clip (the checkpoint has other models under these names" in message


def test_a_record_of_another_version_is_said_to_be_one(run: VisionConfig) -> None:
    """The first did not say its version, and its keys were others."""
    first = {"images": {"seed": 1}, "teachers": {"clip": {"model": "x:None", "view": "match"}}, "statistics": {"steps": 3}}
    own = describe_data(run, FACTS, {"seed": 1})
    with pytest.raises(ValueError) as refusal:
        require_same(first, own)
    assert f"made by an earlier version of this project (its record of the targets has version 1, not {VERSION})" in str(refusal.value)
    assert "finish the run with the version that began it, or start a new run from its weights" in str(refusal.value)
    assert "restore these options" not in str(refusal.value) and "\n" not in str(refusal.value)
    assert same_teachers(first, own) == []
    message = describe_new_spaces(first, own)
    assert message is not None and "clip, dino, sam (the checkpoint was made by an earlier version" in message
    with pytest.raises(ValueError, match="made by a later version"):
        require_same(saved(run) | {"version": VERSION + 1}, own)
