"""What a teacher is shown for a student's grid, and what it cannot be shown."""

from __future__ import annotations

import pytest

from tests.vision_agglom.small import FACTS
from vision_agglom.config.distill import DistilledTeacherConfig
from vision_agglom.panel import Showing, plan_showing


def teacher(name: str, view: str) -> DistilledTeacherConfig:
    return DistilledTeacherConfig(name=name, library="checkpoint", model="x", pretrained=False, view=view, summary_loss="none")


@pytest.mark.parametrize(
    ("name", "view", "student_side", "showing"),
    [
        ("clip", "match", 4, Showing(28, (4, 4))),
        ("clip", "match", 6, Showing(42, (6, 6))),
        ("dino", "own", 4, Showing(32, (8, 8))),
        ("sam", "mosaic", 4, Showing(32, (4, 4))),
        ("sam", "match", 8, Showing(64, (8, 8))),
    ],
)
def test_showings(name: str, view: str, student_side: int, showing: Showing) -> None:
    assert plan_showing(teacher(name, view), FACTS[name], student_side) == showing


@pytest.mark.parametrize(
    ("view", "student_side", "finding"),
    [
        ("match", 4, "teacher 'sam' takes images of 64 pixels only, .* would need 32; use view=own"),
        ("mosaic", 9, "an image of 72 pixels, .* does not fit its mosaic of 64; use view=own, or a lower resolution"),
    ],
)
def test_what_does_not_fit(view: str, student_side: int, finding: str) -> None:
    with pytest.raises(ValueError, match=finding):
        plan_showing(teacher("sam", view), FACTS["sam"], student_side)
