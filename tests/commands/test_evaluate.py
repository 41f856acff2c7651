"""``evaluate`` refuses what it cannot do before it reads any weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hybrid.__main__ import main
from megatron_hybrid.config import dump_config
from tests.runs import small_run
from tests.test_command_line import command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--limit", "0"), "--limit must be at least 1, got 0"),
        (("--num-fewshot", "-1"), "--num-fewshot must be at least 0, got -1"),
        (("--output", "nowhere/results.json"), "there is no directory nowhere"),
        (("--output", "."), "--output . is a directory"),
    ],
)
def test_bad_options(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "run", "--tasks", "arc_easy", *options])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_tasks_come_before_the_weights(tmp_path: Path, run_ranks) -> None:
    # A run without a checkpoint, and a task that is none.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(small_run(tmp_path)))
    (tmp_path / "task.yaml").write_text("task: [x")
    ((code, out, err),) = run_ranks(command, 1, ["evaluate", str(tmp_path / "run"), "--tasks", str(tmp_path / "task.yaml")])
    assert (code, out) == (2, "") and err.startswith("error: task ") and err.count("\n") == 1, err
