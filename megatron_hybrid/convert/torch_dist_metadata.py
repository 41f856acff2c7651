"""``.metadata`` of a torch_dist directory, which is a pickle, read without letting it run code."""

from __future__ import annotations

import collections
import pathlib
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import metadata as early_dcp
from torch.distributed.checkpoint import filesystem, metadata as dcp, planner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

METADATA = ".metadata"
_ALLOWED = {
    (module.__name__, name): getattr(module, name)
    for module, names in {
        dcp: (
            "Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorStorageMetadata", "BytesStorageMetadata",
            "TensorProperties", "_MEM_FORMAT_ENCODING",
        ),
        early_dcp: ("TensorProperties", "MEM_FORMAT_ENCODING"),  # where torch had them up to 2.2
        filesystem: ("_StorageInfo",),
        planner: ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
        torch: ("Size",),
        torch.serialization: ("_get_layout",),
        collections: ("OrderedDict",),
        pathlib: ("PosixPath", "PurePosixPath"),
    }.items()
    for name in names
}  # fmt: skip
"""What torch writes there, and megatron-core, which adds the plan of every rank. _get_layout looks a name up in a table."""
_ALLOWED |= {
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): Metadata,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): planner.SavePlan,
}
"""What megatron-core had up to 0.15: the same with a field more, and no code of their own."""
_LATER_MODULES = {"pathlib._local": "pathlib"}
"""Where Python 3.13 has what is pickled."""


class _NotAllowed(pickle.UnpicklingError):
    """The pickle asks for something else."""


def _member(enumeration: object, name: str) -> Enum:
    """getattr for what early Python 3.11 (3.11.2, for one) pickles with it: members of enumerations."""
    if not any(enumeration is allowed for allowed in _ALLOWED.values() if isinstance(allowed, type) and issubclass(allowed, Enum)):
        raise _NotAllowed(f"getattr of {enumeration!r}")
    return enumeration[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (known := _ALLOWED.get((_LATER_MODULES.get(module, module), name))) is not None:
            return known
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise _NotAllowed(f"{module}.{name}")


def read_metadata(path: Path) -> Metadata:
    """Return a directory's metadata, with every entry of the type that it should have.

    Raises:
        ValueError: there is none, it is damaged, or it asks for anything but the types it consists of, which are all that is ever called.
    """
    file = path / METADATA
    if not file.is_file():
        raise ValueError(f"{path} is no torch_dist checkpoint: it has no {METADATA}")
    try:
        with file.open("rb") as stream:
            metadata = _Unpickler(stream).load()
    except _NotAllowed as error:
        raise ValueError(f"{file} asks for {error}, which could run code, so it is not read; use a checkpoint that you trust") from None
    except OSError:
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}); copy it again") from None
    if not _is_whole(metadata):
        raise ValueError(f"{file} is damaged: it is no list of tensors and files; copy it again")
    return metadata


def _is_whole(metadata: object) -> bool:
    try:
        tensors = {key: entry for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)}
        return (
            isinstance(metadata, Metadata)
            and all(map(_is_stored, metadata.storage_data.items()))
            and all(isinstance(key, str) and isinstance(entry.properties.dtype, torch.dtype) for key, entry in tensors.items())
            and all(
                MetadataIndex(key, chunk.offsets) in metadata.storage_data and _lies_in(chunk, entry.size)
                for key, entry in tensors.items()
                for chunk in entry.chunks
            )
        )
    except (AttributeError, TypeError, ValueError):
        return False


def _lies_in(chunk: ChunkStorageMetadata, whole: torch.Size) -> bool:
    return all(0 <= first <= first + size <= end for first, size, end in zip(chunk.offsets, chunk.sizes, whole, strict=True))


def _is_stored(item: tuple[object, object]) -> bool:
    index, info = item
    # A path that leaves the directory is nobody's checkpoint.
    return (
        isinstance(index, MetadataIndex)
        and isinstance(info, _StorageInfo)
        and Path(info.relative_path).name == info.relative_path
        and type(info.offset) is type(info.length) is int
        and min(info.offset, info.length) >= 0
    )
