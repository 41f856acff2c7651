"""Procedural scenes and what is known of them; the shipped photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tools import make_image_shards
from vision_agglom.images.labelled import read_labelled
from vision_agglom.images.open_source import open_source
from vision_agglom.images.photographs import load_photographs
from vision_agglom.images.scenes import NUM_SCENE_CLASSES, draw_scene


def test_a_scene_is_decided_by_its_index_and_seed() -> None:
    one, two = draw_scene(5, side=40), draw_scene(5, side=40)
    np.testing.assert_array_equal(one.image, two.image)
    np.testing.assert_array_equal(one.mask, two.mask)
    assert (one.image != draw_scene(5, side=40, seed=1).image).any()


def test_the_class_is_that_of_the_largest_shape_and_every_class_occurs() -> None:
    classes = set()
    for index in range(100):
        scene = draw_scene(index, side=48)
        classes.add(scene.class_index)
        sizes = np.bincount(scene.mask.ravel(), minlength=NUM_SCENE_CLASSES)
        assert sizes[scene.class_index] > 0.02 * scene.mask.size
        assert scene.mask.max() < NUM_SCENE_CLASSES
    assert classes == set(range(1, NUM_SCENE_CLASSES))


def test_a_finer_scene_shows_the_same() -> None:
    coarse, fine = draw_scene(9, side=32), draw_scene(9, side=96)
    assert (fine.mask[1::3, 1::3] == coarse.mask).mean() == 1.0, "pixel centres of the coarse scene are pixel centres of the fine one"


def test_the_mask_follows_the_picture() -> None:
    scene = draw_scene(3, side=64)
    inside = scene.image[scene.mask == scene.class_index].astype(float)
    outside = scene.image[scene.mask == 0].astype(float)
    assert np.abs(inside.mean(0) - outside.mean(0)).max() > 10


def test_photographs_are_rgb() -> None:
    photographs = load_photographs()
    assert len(photographs) == 20
    assert all(
        image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and min(image.shape[:2]) > 150 for image in photographs.values()
    )


def test_the_tool_makes_labelled_samples_and_packs_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["samples", "--output", str(tmp_path / "s"), "--crops", "25", "--scenes", "8", "--side", "32", "--samples-per-shard", "20"]
    assert make_image_shards.main(command) == 0
    out = capsys.readouterr().out
    assert "photographs-00001.tar: 5 images" in out and "scenes_eval-00000.tar: 2 images" in out
    crops = open_source(str(tmp_path / "s/photographs-*.tar"))
    (batch,) = read_labelled(crops, resolution=24, batch_size=50)
    assert batch.images_BCHW.shape == (25, 3, 24, 24)
    assert batch.classes_B is not None and batch.classes_B.tolist() == [*range(20), *range(5)]
    assert batch.masks_BHW is None
    first, second = read_labelled(open_source(str(tmp_path / "s/scenes-*.tar")), resolution=32, batch_size=5)
    scene = draw_scene(6, side=32)
    assert second.masks_BHW is not None and (second.masks_BHW[1].numpy() == scene.mask).all()
    assert second.classes_B is not None and second.classes_B[1] == scene.class_index
    for name, data in (("a/1.png", b"one"), ("b/2.png", b"two")):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(data)
    assert make_image_shards.main(["folder", str(tmp_path / "f"), "--output", str(tmp_path / "packed")]) == 0
    packed = open_source(str(tmp_path / "packed-00000.tar"))
    assert [(packed.read(n).image, packed.read(n).class_index) for n in range(2)] == [(b"one", 0), (b"two", 1)]


def test_the_tool_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_image_shards.main(["folder", str(tmp_path), "--output", str(tmp_path / "x")]) == 2
    assert make_image_shards.main(["index", str(tmp_path / "none.tar")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "no image in it or below" in errors[0] and "none.tar: No such file" in errors[1]
