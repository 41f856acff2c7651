"""webdataset shards: what is written is read, by number, and what is not a sound shard is refused in one line."""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from vision_agglom.images import pack
from vision_agglom.images.open_source import expand_braces, open_source
from vision_agglom.images.records import Record
from vision_agglom.images.scenes import draw_scene
from vision_agglom.images.shards import ShardSource, index_path, load_index, scan_shard


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar as other tools write them."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_reads_what_was_written(scenes: Path) -> None:
    source = open_source(str(scenes))
    assert len(source) == 20
    for number in (0, 7, 8, 19):
        record, scene = source.read(number), draw_scene(number, side=48)
        assert record.image == pack.encode_png(scene.image)
        assert record.mask == pack.encode_png(scene.mask)
        assert record.class_index == scene.class_index
        assert record.name.endswith(f"scenes-{number // 8:05d}.tar/{number:08d}.png")


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    records = [Record("a.png", b"one", 3), Record("a.jpg", b"two", None, b"mask")]
    first, second = (pack.write_shards(records, tmp_path / name / "s", 5)[0] for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_members_of_a_sample_may_lie_apart_and_others_are_passed_over(tmp_path: Path) -> None:
    members = {"d/b.jpg": b"B", "d/a.jpg": b"A", "d/b.json": b"{}", "d/a.cls": b"4", "d/c.txt": b"no image", "d/b.mask.png": b"M"}
    source = ShardSource([write_tar(tmp_path / "x.tar", members)])
    assert [source.read(number) for number in range(len(source))] == [
        Record(f"{tmp_path}/x.tar/d/b.jpg", b"B", None, b"M"),
        Record(f"{tmp_path}/x.tar/d/a.jpg", b"A", 4, None),
    ]


def test_long_names_are_read(tmp_path: Path) -> None:
    name = "deep/" * 40 + "x.jpg"
    source = ShardSource([write_tar(tmp_path / "x.tar", {name: b"data"})])
    assert source.read(0).image == b"data"


def test_the_index_is_mapped_and_says_what_a_scan_says(scenes: Path) -> None:
    shard = scenes / "scenes-00000.tar"
    mapped = load_index(shard)
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, scan_shard(shard))


def test_an_index_of_another_file_is_not_believed(scenes: Path, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", {"a.jpg": b"A"})
    shutil.copy(index_path(scenes / "scenes-00000.tar"), index_path(shard))
    assert len(ShardSource([shard])) == 1


def test_a_pickled_source_reads_the_same(scenes: Path) -> None:
    source = open_source(str(scenes))
    again = pickle.loads(pickle.dumps(source))
    assert again.read(11) == source.read(11)
    assert again.digest() == source.digest()
    assert len(pickle.dumps(source)) < 2000, "mapped indexes are mapped again, not copied"


def test_patterns_name_shards(scenes: Path) -> None:
    assert expand_braces("a{08..10}.tar") == ["a08.tar", "a09.tar", "a10.tar"]
    assert expand_braces("{0..1}/{0..1}") == ["0/0", "0/1", "1/0", "1/1"]
    assert len(open_source(f"{scenes}/scenes-{{00000..00001}}.tar")) == 16
    assert len(open_source(f"{scenes}/*.tar")) == 20


def test_an_empty_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.tar: the shard is empty: no member ends in bmp, jpeg"):
        open_source(str(write_tar(tmp_path / "x.tar", {"a.txt": b"text"})))
    with pytest.raises(ValueError, match=r"y\.tar: the shard is empty"):
        open_source(str(write_tar(tmp_path / "y.tar", {})))
    (tmp_path / "z.tar").touch()
    with pytest.raises(ValueError, match=r"z\.tar: .*expected a whole, uncompressed tar"):
        open_source(str(tmp_path / "z.tar"))


def test_a_missing_shard_is_named(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scenes-00003\.tar: no such file or folder \(given as "):
        open_source(f"{scenes}/scenes-{{00002..00003}}.tar")
    with pytest.raises(ValueError, match="nothing: no such file or folder"):
        open_source(str(tmp_path / "nothing"))


def test_a_shard_cut_short_is_refused(scenes: Path, tmp_path: Path) -> None:
    data = (scenes / "scenes-00000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.tar: unexpected end of data; expected a whole"):
        open_source(str(tmp_path / "cut.tar"))


def test_a_shard_cut_short_after_it_was_indexed_is_named(scenes: Path, tmp_path: Path) -> None:
    shard = Path(shutil.copy(scenes / "scenes-00000.tar", tmp_path))
    source = open_source(str(shard))
    with open(shard, "r+b") as stream:
        stream.truncate(3000)
    with pytest.raises(OSError, match="scenes-00000.tar: cut short: .* it changed since it was indexed"):
        source.read(7)


def test_a_compressed_tar_and_other_files_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ValueError, match="expected a whole, uncompressed tar"):
        open_source(str(tmp_path / "x.tar"))
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"a\.jpg is neither a folder nor a \.tar"):
        open_source(str(tmp_path / "a.jpg"))


def test_a_sample_with_two_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sample 'a' has two members that hold its image; the second is 'a\.png'"):
        open_source(str(write_tar(tmp_path / "x.tar", {"a.jpg": b"1", "a.png": b"2"})))
