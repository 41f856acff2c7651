"""Tools end as the commands do: exit code 2 for what the user has to mend, 1 for what failed."""

from __future__ import annotations

import errno

import pytest

from megatron_hybrid.substrate.exit_codes import ExitCode
from tools.failure import report_failure


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no such token"), ExitCode.BAD_INPUT),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "corpus.jsonl"), ExitCode.BAD_INPUT),
        (OSError(errno.ENOSPC, "No space left on device"), ExitCode.ERROR),
    ],
)
def test_what_the_user_can_mend_is_told_from_what_failed(
    error: ValueError | OSError, code: ExitCode, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_failure(error) == code
    assert capsys.readouterr().err == f"error: {error}\n"
