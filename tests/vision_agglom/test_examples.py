"""Every teacher of the shipped examples takes what it is shown at every resolution of every stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vision_agglom.config.load import load_config
from vision_agglom.config.schema import VisionConfig
from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.contract import TeacherFacts
from vision_agglom.muster import check_facts, load_facts
from vision_agglom.panel import plan_showing
from vision_agglom.teachers import load_teacher
from vision_agglom.teachers.frozen import FrozenTeacher
from vision_agglom.teachers.tower import IMAGENET, Described, Tower

EXAMPLES = Path(__file__).parents[2] / "examples/radio"

PUBLISHED = {
    "clip": {"patch_size": 14, "resolution": 378, "fixed_resolution": True},
    "siglip": {"patch_size": 14, "resolution": 384, "fixed_resolution": True},
    "dino": {"patch_size": 14, "resolution": 518, "fixed_resolution": False},
    "sam": {"patch_size": 16, "resolution": 1024, "fixed_resolution": True, "can_change_sides": False},
}
"""What the models that RADIOv2.5 learned from are: DFN CLIP-H/14, SigLIP SO400M/14, DINOv2-g/14 with registers, SAM-H/16."""


def published_teacher(spec: TeacherConfig, device: torch.device, dtype: torch.dtype) -> FrozenTeacher:
    """A teacher of the published sizes whose features are zeros of one channel."""
    sizes = PUBLISHED[spec.name]
    patch = sizes["patch_size"]

    def describe(pixels: Tensor) -> Described:
        spatial = pixels.new_zeros(len(pixels), (pixels.shape[2] // patch) * (pixels.shape[3] // patch), 1)
        return (None if spec.name == "sam" else spatial[:, 0]), spatial

    return FrozenTeacher(Tower(nn.Identity(), describe, normalisation=IMAGENET, **sizes), spec, device, dtype)


def shown(run: VisionConfig, facts: dict[str, TeacherFacts], resolution: int) -> dict[str, int]:
    """Side in pixels that each teacher is shown."""
    return {teacher.name: plan_showing(teacher, facts[teacher.name], resolution // run.student.patch_size).side for teacher in run.teachers}


def test_radio_v2_5_shows_every_teacher_every_resolution() -> None:
    run = load_config(EXAMPLES / "radio_v2.5.yaml")
    facts = load_facts(run, published_teacher)
    check_facts(run, facts)
    assert {name: fact.resolution for name, fact in facts.items()} == {"clip": 378, "siglip": 378, "dino": 518, "sam": 1024}
    assert shown(run, facts, 256) == {"clip": 224, "siglip": 224, "dino": 224, "sam": 256}
    assert shown(run, facts, 432) == {"clip": 378, "siglip": 378, "dino": 378, "sam": 432}
    assert shown(run, facts, 1024) == {"clip": 896, "siglip": 896, "dino": 896, "sam": 1024}


def test_the_photographs_twins_take_what_they_are_shown() -> None:
    run = load_config(EXAMPLES / "photographs.yaml")
    facts = load_facts(run, load_teacher)
    check_facts(run, facts)
    assert shown(run, facts, 96) == {"siglip": 84, "dino": 84, "sam": 96}


def test_a_teacher_of_one_side_is_refused_where_it_would_need_another() -> None:
    run = load_config(EXAMPLES / "radio_v2.5.yaml")
    teachers = tuple(teacher.model_copy(update={"sides": "own"}) for teacher in run.teachers)
    run = run.model_copy(update={"teachers": teachers})
    with pytest.raises(ValueError, match="teacher 'clip' takes images of 378 pixels only, and for 16 patches a side, .* it would need 224"):
        check_facts(run, load_facts(run, published_teacher))
