"""``describe`` says what a run is, in the run's own numbers."""

from __future__ import annotations

from pathlib import Path

from tests.vision_agglom.small import FACTS, small_vision_run
from vision_agglom.commands.arguments import read_config
from vision_agglom.commands.describe import describe, describe_showings, main

EXAMPLES = Path(__file__).parents[3] / "examples/radio"


def test_every_partition_and_resolution_has_a_line(tmp_path: Path) -> None:
    lines = describe(small_vision_run(tmp_path)).splitlines()
    rows = [line.split() for line in lines if line.startswith("0 ")]
    # steps, images per step, rate, resolution, tokens: 4 class and register tokens and the patches.
    assert [row[1:6] for row in rows] == [["4", "8", "1", "32", "20"], ["4", "4", "1", "48", "40"], ["4", "4", "1", "40", "29"]]
    assert rows[0][7:] == ["clip,", "dino,", "sam"] and rows[1][7:] == ["clip,", "dino"]
    assert "4 steps, 48 images" in lines[-1]


def test_both_examples_are_runs() -> None:
    for name in ("photographs", "radio_v2.5"):
        run = read_config(str(EXAMPLES / f"{name}.yaml"), ["parallel.tensor=2", "parallel.pipeline=2"])
        assert run is not None and "tensor 2, pipeline 2 x 1" in describe(run)


def test_what_is_wrong_is_printed_and_nothing_raised(capsys) -> None:
    assert read_config(str(EXAMPLES / "photographs.yaml"), ["student.hidden_sise=3"]) is None
    assert "did you mean 'student.hidden_size'" in capsys.readouterr().err


def test_loaded_teachers_say_what_they_are_shown(tmp_path: Path) -> None:
    lines = describe_showings(small_vision_run(tmp_path), FACTS).splitlines()
    assert lines[0].endswith("shown at 32, 40, 48")
    assert lines[1].split() == ["clip", "7", "28", "any", "12", "20", "28,", "35,", "42"]
    assert lines[3].split() == ["sam", "8", "64", "fixed", "-", "16", "32,", "-,", "-"]


def test_what_train_would_refuse_of_a_teacher_is_refused(tmp_path: Path, capsys) -> None:
    assert main([str(EXAMPLES / "photographs.yaml"), "--load-teachers"]) == 0
    assert [line.split()[:4] for line in capsys.readouterr().out.splitlines()[-3:]] == [
        ["siglip", "14", "126", "any"],
        ["dino", "14", "126", "any"],
        ["sam", "16", "256", "fixed"],
    ]
    (tmp_path / "own.yaml").write_text((EXAMPLES / "photographs.yaml").read_text().replace("    sides: any\n", ""))
    assert main([str(tmp_path / "own.yaml"), "--load-teachers"]) == 2
    assert "teacher 'siglip' takes images of 126 pixels only" in capsys.readouterr().err
