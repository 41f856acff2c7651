"""Writing webdataset shards with their indexes, byte for byte the same from the same samples."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from vision_agglom.images.records import CLASS_EXTENSION, IMAGE_EXTENSIONS, MASK_EXTENSION, Record, split_extension
from vision_agglom.images.shards import write_index


def write_shards(records: Iterable[Record], prefix: Path, samples_per_shard: int) -> list[Path]:
    """Write ``prefix-00000.tar`` and so on, each with its index, and return their paths.

    Members are named by the sample's number and the record's extension. A shard appears under its name only when it is whole.

    Raises:
        ValueError: there are no records, or samples_per_shard is not positive.
    """
    if samples_per_shard <= 0:
        raise ValueError(f"samples_per_shard={samples_per_shard}: expected 1 or more")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    tar: tarfile.TarFile | None = None
    partial = prefix.with_name(f"{prefix.name}.partial")
    try:
        for number, record in enumerate(records):
            if number % samples_per_shard == 0:
                _finish(tar, partial, shards)
                shards.append(prefix.with_name(f"{prefix.name}-{len(shards):05d}.tar"))
                tar = tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT)
            assert tar is not None
            _add_record(tar, f"{number:08d}", record)
        if tar is None:
            raise ValueError(f"{prefix}: no images to write")
        _finish(tar, partial, shards)
    finally:
        partial.unlink(missing_ok=True)
    return shards


def encode_jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    """Return uint8 [height, width, 3] as a JPEG file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality, subsampling=0)
    return stream.getvalue()


def encode_png(image: np.ndarray) -> bytes:
    """Return uint8 [height, width(, 3)] as a PNG file, without loss."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def _add_record(tar: tarfile.TarFile, key: str, record: Record) -> None:
    extension = split_extension(record.name)[1]
    assert extension in IMAGE_EXTENSIONS, record.name
    _add(tar, f"{key}.{extension}", record.image)
    if record.class_index is not None:
        _add(tar, f"{key}.{CLASS_EXTENSION}", str(record.class_index).encode())
    if record.mask is not None:
        _add(tar, f"{key}.{MASK_EXTENSION}", record.mask)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(data))


def _finish(tar: tarfile.TarFile | None, partial: Path, shards: list[Path]) -> None:
    if tar is not None:
        tar.close()
        os.replace(partial, shards[-1])
        write_index(shards[-1])
