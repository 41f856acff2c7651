"""torch_dist checkpoints (megatron-core's, on torch.distributed.checkpoint) a tensor at a time, in one process."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_hybrid.convert.correspondence import NativeTensor
from megatron_hybrid.convert.specs import TensorSpec
from megatron_hybrid.convert.torch_dist_metadata import read_metadata

_NOT_WEIGHTS = ("optimizer.", "chained_", "fp8.")
"""Beginnings of the keys of optimizer state and of float8 scaling state."""


class TorchDistReader:
    """The weights in one checkpoint directory; optimizer state and objects are left out.

    Raises:
        ValueError: it is no such directory, its metadata is damaged or could run code, or a file is shorter than the metadata says; the
            message names the tensors that are cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata = read_metadata(path)
        self._storage: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(_NOT_WEIGHTS) and not key.endswith("_extra_state")
        }
        self._check_sizes()

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """What is in it."""
        return {key: TensorSpec(tuple(entry.size), entry.properties.dtype) for key, entry in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        """Return a whole tensor, put together from its shards.

        Raises:
            ValueError: a shard cannot be read, or they do not make up the tensor.
        """
        entry = self._tensors[key]
        if len(entry.chunks) == 1:
            return self._read_chunk(key, entry.chunks[0])
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        num_elements = 0
        for chunk in entry.chunks:
            place = tuple(slice(first, first + size) for first, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[place] = self._read_chunk(key, chunk)
            num_elements += chunk.sizes.numel()
        if num_elements != whole.numel():
            raise ValueError(f"{self.path}: the shards of {key} have {num_elements} elements, the tensor {whole.numel()}")
        return whole

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._storage[MetadataIndex(key, chunk.offsets)]
        try:
            with (self.path / info.relative_path).open("rb") as file:
                tensor = torch.load(_create_file_view(file, info.offset, info.length), map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.path / info.relative_path}: {key} cannot be read ({type(error).__name__}: {error})") from error
        if tensor.shape != chunk.sizes:
            raise ValueError(
                f"{self.path / info.relative_path}: {key} is {list(tensor.shape)} there, its metadata says {list(chunk.sizes)}"
            )
        return tensor

    def _check_sizes(self) -> None:
        sizes = {
            name: (self.path / name).stat().st_size if (self.path / name).is_file() else 0
            for name in {info.relative_path for info in self._storage.values()}
        }
        cut_off = [
            index.fqn
            for index, info in self._storage.items()
            if index.fqn in self._tensors and info.offset + info.length > sizes[info.relative_path]
        ]
        if cut_off:
            raise ValueError(
                f"{self.path} is truncated: a file is missing or too short for {', '.join(dict.fromkeys(cut_off[:3]))}; copy it again"
            )


class TorchDistWriter:
    """A checkpoint directory whose tensors are cut, and shared out to files, as ranks of a layout would have written them.

    Args:
        directory: where the files go; must exist.
        tensor_ranks: parts that a tensor is cut into along its axis.
        num_stages: pipeline stages; every stage has files of its own.
    """

    def __init__(self, directory: Path, *, tensor_ranks: int, num_stages: int) -> None:
        self._directory, self._tensor_ranks, self._num_stages = directory, tensor_ranks, num_stages
        self._files: dict[str, BinaryIO] = {}

    @property
    def file_names(self) -> list[str]:
        """One file per rank of the layout."""
        return [_file_name(rank) for rank in range(self._tensor_ranks * self._num_stages)]

    def open(self, sizes: dict[str, int]) -> None:
        """Open the files, each cut back to the size that is to be kept of it; files not named are emptied."""
        for name in self.file_names:
            size = sizes.get(name, 0)
            self._files[name] = (self._directory / name).open("r+b" if size else "wb")
            self._files[name].truncate(size)
            self._files[name].seek(size)

    def write(self, native: NativeTensor, tensor: Tensor, stage: int) -> list[dict[str, Any]]:
        """Append a tensor's shards, and return what ``finish`` needs to know of them, as plain JSON."""
        shards = (tensor,) if native.axis is None else tensor.chunk(self._tensor_ranks, native.axis)
        records = []
        first = [0] * tensor.ndim
        for rank, shard in enumerate(shards):
            name = _file_name(stage * self._tensor_ranks + rank)
            start = self._files[name].tell()
            # torch.save writes a view's whole storage.
            is_whole = shard.is_contiguous() and shard.nbytes == shard.untyped_storage().nbytes()
            torch.save(shard if is_whole else shard.clone(memory_format=torch.contiguous_format), self._files[name])
            records.append(
                {
                    "key": native.key,
                    "whole": list(tensor.shape),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "first": list(first),
                    "shape": list(shard.shape),
                }
                | {"file": name, "start": start, "length": self._files[name].tell() - start}
            )
            if native.axis is not None:
                first[native.axis] += shard.shape[native.axis]
        return records

    def flush(self) -> list[BinaryIO]:
        """Hand everything to the kernel, and return the files for synchronisation."""
        for file in self._files.values():
            file.flush()
        return list(self._files.values())

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def finish_directory(directory: Path, records: Sequence[dict[str, Any]], common: dict[str, Any]) -> None:
    """Write what joins the files into a checkpoint: ``.metadata``, ``metadata.json`` and ``common.pt``.

    Args:
        directory: where the files are.
        records: what ``TorchDistWriter.write`` returned, of all tensors.
        common: what is not sharded.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    results = []
    for record in records:
        properties = TensorProperties(dtype=getattr(torch, record["dtype"]))
        entry = tensors.setdefault(record["key"], TensorStorageMetadata(properties, torch.Size(record["whole"]), []))
        place = torch.Size(record["first"])
        index = MetadataIndex(record["key"], place, len(entry.chunks))
        entry.chunks.append(ChunkStorageMetadata(place, torch.Size(record["shape"])))
        results.append(WriteResult(index, record["length"], _StorageInfo(record["file"], record["start"], record["length"])))
    # Metadata is per file system writer, which wants to have prepared the directory itself.
    writer = FileSystemWriter(directory)
    writer.set_up_storage_writer(is_coordinator=True)
    writer.finish(Metadata(tensors), [results])
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    torch.save(common, directory / "common.pt")


def _file_name(rank: int) -> str:
    return f"__{rank}_0.distcp"
