"""webdataset tar shards, read by offset.

A shard is a plain tar in which the members of one sample share their name up to the first dot: ``0017.jpg``, and where there are labels
``0017.cls`` (the class index as text) and ``0017.mask.png``. Other members (captions, JSON) are passed over.

Random access needs each member's place. An index beside the shard (``NAME.tar.index.npy``, written by ``tools.make_image_shards``) holds
it and is mapped, not read; without one the shard's headers are scanned once. The index is an int64 table [1 + samples, 6]: first the row
(version, bytes of the tar, samples, 0, 0, 0), then for each sample the offset and size of image, class and mask, size 0 where absent.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vision_agglom.images.records import CLASS_EXTENSION, IMAGE_EXTENSIONS, MASK_EXTENSION, Record, split_extension

_VERSION = 1
_COLUMNS = {"image": 0, "class": 2, "mask": 4}
_BLOCK_BYTES = 512


def index_path(shard: Path) -> Path:
    """Return where a shard's index lies."""
    return shard.with_name(shard.name + ".index.npy")


def scan_shard(shard: Path) -> np.ndarray:
    """Return a shard's index (see above) from its headers.

    Raises:
        ValueError: no such file, no plain tar, cut short, without images, or a sample in it has two images.
    """
    rows: dict[str, list[int]] = {}
    try:
        size_bytes = shard.stat().st_size
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isfile():
                    _note_member(shard, rows, member)
    except OSError as error:
        raise ValueError(f"{shard}: {error.strerror or error}; expected a webdataset shard") from None
    except tarfile.TarError as error:
        raise ValueError(f"{shard}: {error}; expected a whole, uncompressed tar") from None
    table = np.array([row for row in rows.values() if row[1] > 0], dtype=np.int64).reshape(-1, 6)
    if not len(table):
        raise ValueError(f"{shard}: the shard is empty: no member ends in {', '.join(sorted(IMAGE_EXTENSIONS))}")
    return np.concatenate([np.array([[_VERSION, size_bytes, len(table), 0, 0, 0]], dtype=np.int64), table])


def write_index(shard: Path) -> int:
    """Scan a shard, write its index beside it, and return its number of samples."""
    table = scan_shard(shard)
    partial = index_path(shard).with_suffix(".partial")
    with open(partial, "wb") as stream:
        np.save(stream, table)
    os.replace(partial, index_path(shard))
    return len(table) - 1


def load_index(shard: Path) -> np.ndarray:
    """Return a shard's index: mapped from the file beside it where that fits the shard, scanned otherwise.

    Raises:
        ValueError: see ``scan_shard``.
    """
    path = index_path(shard)
    if path.exists() and shard.exists():
        table = np.load(path, mmap_mode="r")
        fits = table.ndim == 2 and table.shape[1] == 6 and tuple(table[0, :3]) == (_VERSION, shard.stat().st_size, len(table) - 1)
        if fits:
            return table
    return scan_shard(shard)


class ShardSource:
    """The samples of several shards, in the order of the shards' names.

    Raises:
        ValueError: see ``scan_shard``.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = tuple(shards)
        self._tables = self._load_tables()
        self._ends = np.cumsum([len(table) - 1 for table in self._tables])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, object]:
        # A mapped table would be copied into every worker; it is mapped again there.
        tables = [None if isinstance(table, np.memmap) else table for table in self._tables]
        return {"shards": self._shards, "tables": tables, "ends": self._ends}

    def __setstate__(self, state: dict[str, object]) -> None:
        self._shards, self._ends = state["shards"], state["ends"]
        pairs = zip(self._shards, state["tables"], strict=True)
        self._tables = [load_index(shard) if table is None else table for shard, table in pairs]

    def read(self, number: int) -> Record:
        """Return sample ``number``."""
        which = int(np.searchsorted(self._ends, number, side="right"))
        shard, table = self._shards[which], self._tables[which]
        row = [int(value) for value in table[1 + number - (int(self._ends[which - 1]) if which else 0)]]
        with open(shard, "rb", buffering=0) as stream:
            image, label, mask = (_read_exactly(stream, shard, *row[column : column + 2]) for column in _COLUMNS.values())
            name = f"{shard}/{_member_name(stream, row[0])}"
        return Record(name, image, int(label) if label else None, mask or None)

    def digest(self) -> str:
        """Return a hash of the shards' names and of where their members lie."""
        digest = hashlib.blake2b(digest_size=8)
        for shard, table in zip(self._shards, self._tables, strict=True):
            digest.update(shard.name.encode())
            digest.update(np.ascontiguousarray(table).tobytes())
        return digest.hexdigest()

    def _load_tables(self) -> list[np.ndarray]:
        show = sum(not index_path(shard).exists() for shard in self._shards) > 8
        return [load_index(shard) for shard in tqdm(self._shards, desc="index shards", unit="shard", disable=not show)]


def _read_exactly(stream: FileIO, shard: Path, offset: int, size: int) -> bytes:
    data = os.pread(stream.fileno(), size, offset) if size else b""
    if len(data) != size:
        raise OSError(f"{shard}: cut short: {len(data)} of {size} bytes at {offset}; it changed since it was indexed")
    return data


def _note_member(shard: Path, rows: dict[str, list[int]], member: tarfile.TarInfo) -> None:
    key, extension = split_extension(member.name)
    part = {CLASS_EXTENSION: "class", MASK_EXTENSION: "mask"}.get(extension, "image" if extension in IMAGE_EXTENSIONS else None)
    if part is None:
        return
    column = _COLUMNS[part]
    row = rows.setdefault(key, [0] * 6)
    if row[column + 1]:
        raise ValueError(f"{shard}: sample {key!r} has two members that hold its {part}; the second is {member.name!r}")
    row[column : column + 2] = [member.offset_data, member.size]


def _member_name(stream: FileIO, offset: int) -> str:
    """Return the name in the header before a member's data; of a long name its first 100 bytes."""
    header = os.pread(stream.fileno(), _BLOCK_BYTES, offset - _BLOCK_BYTES)
    return header[:100].split(b"\0", 1)[0].decode("utf-8", "replace")
