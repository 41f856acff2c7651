"""Safetensors files read and written a tensor at a time.

The format is eight bytes (the header's length, little endian), a JSON header (name -> dtype, shape, first and end byte) and the values.
The library's own writer wants all tensors of a file in memory, and its reader maps the file, so that what was read counts against the
process until the file is closed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_hybrid.convert.specs import TensorSpec

_LENGTH_BYTES = 8
_ALIGNMENT = 8
_MAX_HEADER_BYTES = 100_000_000
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()} | {
    "F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    spec: TensorSpec
    first_byte: int
    """Counted from the beginning of the file."""


class SafetensorsReader:
    """One file.

    Raises:
        ValueError: it is no safetensors file, or shorter than its header says; the message names the tensors that are cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 0 < length <= _MAX_HEADER_BYTES:
                raise ValueError(f"{path} is no safetensors file: its header would have {length} bytes")
            try:
                header = json.loads(file.read(length))
                self._entries = {name: _entry(fields, _LENGTH_BYTES + length) for name, fields in header.items() if name != "__metadata__"}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is no safetensors file, or its header is damaged ({type(error).__name__}: {error})") from None
        size_bytes = path.stat().st_size
        beyond = [name for name, entry in self._entries.items() if entry.first_byte + entry.spec.size_bytes > size_bytes]
        if beyond:
            raise ValueError(
                f"{path} is truncated: it has {size_bytes:,} bytes, and {', '.join(beyond[:3])} would lie beyond them; copy it again"
            )

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """What is in it."""
        return {name: entry.spec for name, entry in self._entries.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor, in memory of its own."""
        entry = self._entries[name]
        tensor = torch.empty(entry.spec.shape, dtype=entry.spec.dtype)
        with self.path.open("rb") as file:
            file.seek(entry.first_byte)
            count = file.readinto(_bytes_of(tensor))
        if count != tensor.nbytes:
            raise ValueError(f"{self.path} is truncated: {name} has {count:,} of {tensor.nbytes:,} bytes; copy it again")
        return tensor


class SafetensorsWriter:
    """One file whose tensors are written in the order they are announced in.

    Args:
        path: the file; replaced unless there are tensors in it to keep.
        specs: name -> shape and dtype of everything that will be written.
        num_written: tensors that an earlier writer of the same announcement has completed.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], num_written: int = 0) -> None:
        header = _header(specs)
        self._names = list(specs)[num_written:]
        end = len(header) + sum(spec.size_bytes for spec in list(specs.values())[:num_written])
        self._file: BinaryIO = path.open("r+b" if num_written else "wb")
        if not num_written:
            self._file.write(header)
        self._file.truncate(end)
        self._file.seek(end)

    @property
    def is_complete(self) -> bool:
        """Whether every tensor is written."""
        return not self._names

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor."""
        assert name == self._names.pop(0), name
        self._file.write(_bytes_of(tensor.contiguous()))

    def flush(self) -> BinaryIO:
        """Hand everything to the kernel, and return the file for synchronisation."""
        self._file.flush()
        return self._file

    def close(self) -> None:
        """Close the file, when everything is on the disk."""
        os.fsync(self.flush().fileno())
        self._file.close()


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    # The library's own files say where they come from, and transformers refuses those that do not.
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    first = 0
    for name, spec in specs.items():
        fields[name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [first, first + spec.size_bytes]}
        first += spec.size_bytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _entry(fields: dict, data_start: int) -> _Entry:
    spec = TensorSpec(tuple(fields["shape"]), _DTYPES[fields["dtype"]])
    first, end = fields["data_offsets"]
    if end - first != math.prod(spec.shape) * spec.dtype.itemsize:
        raise ValueError(f"a tensor of shape {list(spec.shape)} has {end - first} bytes")
    return _Entry(spec, data_start + first)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
