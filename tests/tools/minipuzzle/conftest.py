from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.minipuzzle.small import run_plan, train_parent
from tools.minipuzzle.files import WorkFiles


@pytest.fixture(scope="session")
def parent_folder(tmp_path_factory: pytest.TempPathFactory, rank_pool) -> Path:
    """A folder with a trained parent and its text."""
    folder = tmp_path_factory.mktemp("minipuzzle")
    rank_pool.run(train_parent, 1, folder)
    return folder


@pytest.fixture(scope="session")
def work(parent_folder: Path, rank_pool) -> WorkFiles:
    """What a whole compression of it left; tests that change files take a copy."""
    ((code, relative),) = rank_pool.run(run_plan, 1, parent_folder, timeout_s=280.0)
    assert code == 0 and relative < 0.5
    return WorkFiles(parent_folder / "work")
