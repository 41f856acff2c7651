from __future__ import annotations

import shutil
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
    """What a whole compression of it left. Tests of several files read it, perhaps at once; those that change files take ``copy``."""
    # The limit is for a hang, on whatever host.
    assert rank_pool.run(run_plan, 1, parent_folder, timeout_s=900.0) == [0]
    return WorkFiles(parent_folder / "work")


@pytest.fixture
def copy(work: WorkFiles, tmp_path: Path) -> WorkFiles:
    """A finished compression whose files may be changed."""
    shutil.copytree(work.work_dir, tmp_path / "work")
    return WorkFiles(tmp_path / "work")
