"""``describe`` says what a run is, in the run's own numbers."""

from __future__ import annotations

from pathlib import Path

from tests.vision_agglom.small import small_vision_run
from vision_agglom.commands.arguments import read_config
from vision_agglom.commands.describe import describe

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
