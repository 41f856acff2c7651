"""Tools end as the commands do: exit code 2 for what the user has to mend, 1 for what failed, 130 after Ctrl-C; one line each."""

from __future__ import annotations

import errno

import pytest

from megatron_hybrid.substrate.exit_codes import ExitCode
from tools.failure import run_tool


def raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no such token"), ExitCode.BAD_INPUT),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "corpus.jsonl"), ExitCode.BAD_INPUT),
        (PermissionError(errno.EACCES, "Permission denied", "corpus.jsonl"), ExitCode.BAD_INPUT),
        (OSError(errno.ENOSPC, "No space left on device"), ExitCode.ERROR),
    ],
)
def test_what_the_user_can_mend_is_told_from_what_failed(error: Exception, code: ExitCode, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(lambda: raising(error), "nothing is written") == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_interrupted_tool_says_what_it_leaves_behind(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(lambda: raising(KeyboardInterrupt()), "finished parts are kept") == 130
    assert capsys.readouterr().err == "interrupted: finished parts are kept\n"


def test_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(lambda: print("written"), "nothing is written") == 0
    assert capsys.readouterr().out == "written\n"
