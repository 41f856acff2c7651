"""Folders of images."""

from __future__ import annotations

from pathlib import Path

import pytest

from vision_agglom.images.open_source import open_source


def fill(folder: Path, *names: str) -> Path:
    """Write files that hold their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def test_subfolders_are_classes_and_masks_lie_beside(tmp_path: Path) -> None:
    source = open_source(str(fill(tmp_path, "dog/2.JPG", "cat/1.jpg", "cat/1.mask.png", "cat/readme.txt", "dog/deep/3.webp")))
    records = [source.read(number) for number in range(len(source))]
    assert [(record.image, record.class_index, record.mask) for record in records] == [
        (b"cat/1.jpg", 0, b"cat/1.mask.png"),
        (b"dog/2.JPG", 1, None),
        (b"dog/deep/3.webp", 1, None),
    ]


def test_images_outside_subfolders_mean_no_classes(tmp_path: Path) -> None:
    source = open_source(str(fill(tmp_path, "a.png", "dog/b.png")))
    assert [source.read(number).class_index for number in range(2)] == [None, None]


def test_the_digest_is_of_the_contents_and_not_of_the_place(tmp_path: Path) -> None:
    one, two, three = (open_source(str(fill(tmp_path / name, *files))) for name, files in zip("xyz", (["a.png"], ["a.png"], ["b.png"])))
    assert one.digest() == two.digest() != three.digest()


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no image in it or below; expected files that end in bmp"):
        open_source(str(fill(tmp_path, "notes.txt")))
