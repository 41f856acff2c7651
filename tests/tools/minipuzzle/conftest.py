from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.minipuzzle.small import train_parent


@pytest.fixture(scope="session")
def parent_folder(tmp_path_factory: pytest.TempPathFactory, rank_pool) -> Path:
    """A folder with a trained parent and its text."""
    folder = tmp_path_factory.mktemp("minipuzzle")
    rank_pool.run(train_parent, 1, folder)
    return folder
