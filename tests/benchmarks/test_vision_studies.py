"""What the studies refuse before any image is made or any step is trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import vision_studies


class Begun(Exception):
    """The command line was taken, and images would be made."""


def begin(*_: Any) -> None:
    """Stand in for making images."""
    raise Begun


@pytest.mark.parametrize(
    ("study", "steps", "is_refused"), [("partitions", "1", True), ("partitions", "2", False), ("resolutions", "1", False)]
)
def test_a_clocked_study_needs_a_step_after_the_first(
    study: str, steps: str, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vision_studies", study, "--steps", steps, "--output", str(tmp_path)])
    monkeypatch.setattr(vision_studies, "make_images", begin)
    with pytest.raises(SystemExit if is_refused else Begun):
        vision_studies.main()
    assert ("--steps 1 must be at least 2 for partitions" in capsys.readouterr().err) == is_refused
