"""Collections of images that several tests read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vision_agglom.images.pack import encode_jpeg, encode_png, write_shards
from vision_agglom.images.records import Record
from vision_agglom.images.scenes import draw_scene


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with 20 labelled scenes in shards of 8."""
    folder = tmp_path_factory.mktemp("scenes")
    drawn = [draw_scene(index, side=48) for index in range(20)]
    records = (Record("x.png", encode_png(scene.image), scene.class_index, encode_png(scene.mask)) for scene in drawn)
    write_shards(records, folder / "scenes", 8)
    return folder


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard with 10 images of one colour each, so that a sample tells which image it shows."""
    folder = tmp_path_factory.mktemp("colours")
    records = (Record("x.jpg", encode_jpeg(np.full((40, 60, 3), 20 * number, np.uint8))) for number in range(10))
    return write_shards(records, folder / "colours", 100)[0]
