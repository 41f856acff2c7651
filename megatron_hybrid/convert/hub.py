"""A Hugging Face NemotronH directory: configuration, safetensors in one or several files, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.convert.companions import Companions, copy_tokenizer, read_json, read_token_ids, tokenizer_in
from megatron_hybrid.convert.correspondence import HUB_HEAD, correspondences
from megatron_hybrid.convert.hub_config import HubStyle, hub_from_model, model_from_hub
from megatron_hybrid.convert.rearrange import to_hub
from megatron_hybrid.convert.safetensors_file import SafetensorsReader, SafetensorsWriter
from megatron_hybrid.convert.source import Form
from megatron_hybrid.convert.specs import TensorSpec, check_specs
from megatron_hybrid.convert.target import Plan

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_PREFIXES = {"transformers": "model.", "hub": "backbone."}


class HubSource:
    """A NemotronH directory, under either prefix; names are given under ``model.``.

    Args:
        path: the directory.
        vocab_divisible_by: padding unit of our embedding.

    Raises:
        ValueError: it is not complete, or not a NemotronH that can be converted; the message names the tensors.
    """

    form: Form = "hub"

    def __init__(self, path: Path, *, vocab_divisible_by: int = 128) -> None:
        self.path = path
        self.config = read_hub_config(path)
        self.model: ModelConfig = model_from_hub(self.config, vocab_divisible_by=vocab_divisible_by)
        self.companions = _companions(path, self.config)
        self._stored: dict[str, tuple[SafetensorsReader, str]] = {}
        for reader in _open_files(path):
            for stored in reader.specs:
                name = canonical_name(stored)
                if name in self._stored:
                    raise ValueError(f"{path} has {name} twice: as {self._stored[name][1]} and as {stored}")
                self._stored[name] = (reader, stored)
        self.specs: dict[str, TensorSpec] = {name: reader.specs[stored] for name, (reader, stored) in self._stored.items()}
        check_specs(path, self.specs, {tensor.name: tensor.shape for each in correspondences(self.model) for tensor in each.hub})

    def read(self, name: str) -> Tensor:
        """Return a tensor by its name under ``model.``."""
        reader, stored = self._stored[name]
        return reader.read(stored)


class HubWriter:
    """The weight files of a NemotronH directory, cut into shards of about ``shard_bytes``.

    Args:
        directory: where the files go; must exist.
        specs: every tensor by its name under ``model.``, in the order in which they will be written.
        style: decides the prefix.
        shard_bytes: a file is begun when the one before has this much.
        num_written: tensors that an earlier writer has completed.
    """

    def __init__(
        self, directory: Path, specs: Mapping[str, TensorSpec], *, style: HubStyle, shard_bytes: int, num_written: int = 0
    ) -> None:
        self._directory, self._style = directory, style
        self._shards = _cut(specs, shard_bytes)
        self._num_written = num_written
        self._writer: SafetensorsWriter | None = None

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor."""
        number, place = self._locate(self._num_written)
        if self._writer is None:
            specs = {stored_name(each, self._style): spec for each, spec in self._shards[number].items()}
            self._writer = SafetensorsWriter(self._directory / self._file_name(number), specs, place)
        self._writer.write(stored_name(name, self._style), tensor)
        self._num_written += 1
        if self._writer.is_complete:
            self.close()

    def flush(self) -> list[BinaryIO]:
        """Hand everything to the kernel, and return the files for synchronisation."""
        return [] if self._writer is None else [self._writer.flush()]

    def close(self) -> None:
        """Close the open file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def finish(self, config: Mapping[str, Any]) -> None:
        """Write the configuration, and the index when there is more than one file."""
        (self._directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if len(self._shards) > 1:
            weight_map = {
                stored_name(name, self._style): self._file_name(number) for number, shard in enumerate(self._shards) for name in shard
            }
            total = sum(spec.size_bytes for shard in self._shards for spec in shard.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _file_name(self, number: int) -> str:
        return SINGLE if len(self._shards) == 1 else f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _locate(self, position: int) -> tuple[int, int]:
        """Shard of the tensor at ``position``, and its place in it."""
        for number, shard in enumerate(self._shards):
            if position < len(shard):
                return number, position
            position -= len(shard)
        raise AssertionError("more tensors than announced")


class HubTarget:
    """A NemotronH directory.

    Args:
        plan: what will be written.

    Raises:
        ValueError: the model has what NemotronH does not.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._config = hub_from_model(
            plan.model,
            style=plan.layout.style,
            dtype=plan.main_dtype,
            max_position_embeddings=plan.companions.sequence_length,
            token_ids=plan.companions.token_ids,
        )
        self._num_written = 0

    def open(self, directory: Path, written: Sequence[list[dict[str, Any]]]) -> None:
        """See ``Target``."""
        self._num_written = len(written)
        num_tensors = sum(len(each.hub) for each in self._plan.correspondences[: len(written)])
        self._writer = self._new_writer(directory, num_tensors)

    def write(self, native: Sequence[Tensor]) -> list[dict[str, Any]]:
        """See ``Target``; there is nothing to remember, since the header is written first."""
        correspondence = self._plan.correspondences[self._num_written]
        for description, tensor in zip(correspondence.hub, to_hub(correspondence, native, self._plan.model), strict=True):
            self._writer.write(description.name, tensor)
        self._num_written += 1
        return []

    def flush(self) -> list[BinaryIO]:
        """See ``Target``."""
        return self._writer.flush()

    def close(self) -> None:
        """See ``Target``."""
        self._writer.close()

    def finish(self, directory: Path, written: Sequence[list[dict[str, Any]]]) -> None:
        """See ``Target``."""
        self._new_writer(directory, 0).finish(self._config)
        copy_tokenizer(self._plan.companions, directory, directory)

    def read_back(self, directory: Path) -> HubSource:
        """See ``Target``."""
        return HubSource(directory, vocab_divisible_by=self._plan.model.vocab_divisible_by)

    def _new_writer(self, directory: Path, num_written: int) -> HubWriter:
        pairs = zip(self._plan.correspondences, self._plan.dtypes, strict=True)
        specs = {tensor.name: TensorSpec(tensor.shape, dtype) for each, dtype in pairs for tensor in each.hub}
        layout = self._plan.layout
        return HubWriter(directory, specs, style=layout.style, shard_bytes=layout.shard_bytes, num_written=num_written)


def read_hub_config(path: Path) -> dict[str, Any]:
    """Return a directory's ``config.json``.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    try:
        return read_json(path / CONFIG)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no Hugging Face model: {CONFIG} cannot be read ({type(error).__name__}: {error})") from None


def canonical_name(stored: str) -> str:
    """Return a name under ``model.``, whatever prefix it has."""
    return "model." + stored.removeprefix("backbone.") if stored.startswith("backbone.") else stored


def stored_name(name: str, style: HubStyle) -> str:
    """Return the name under the prefix of a style."""
    return name if name == HUB_HEAD else _PREFIXES[style] + name.removeprefix("model.")


def _open_files(path: Path) -> list[SafetensorsReader]:
    index_file = path / INDEX
    if not index_file.is_file():
        if not (path / SINGLE).is_file():
            raise ValueError(f"{path} has neither {SINGLE} nor {INDEX}; other formats than safetensors are not read")
        return [SafetensorsReader(path / SINGLE)]
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index_file} has no weight_map that names the file of every tensor; copy it again")
    readers = {}
    for name, file in weight_map.items():
        if file not in readers:
            if not (path / file).is_file():
                raise ValueError(f"{path / file} is missing; {INDEX} says it has {name}")
            readers[file] = SafetensorsReader(path / file)
        if name not in readers[file].specs:
            raise ValueError(f"{path / file} does not have {name}, though {INDEX} says so")
    return list(readers.values())


def _cut(specs: Mapping[str, TensorSpec], shard_bytes: int) -> Sequence[dict[str, TensorSpec]]:
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.size_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.size_bytes
    return shards


def _companions(path: Path, config: Mapping[str, Any]) -> Companions:
    tokenizer, files = tokenizer_in(path)
    length = config.get("max_position_embeddings")
    if length is not None and type(length) is not int:
        raise ValueError(f"{CONFIG} has max_position_embeddings={length!r}; expected a number of tokens")
    return Companions(
        tokenizer_files=files,
        tokenizer=tokenizer,
        token_ids=read_token_ids(config, CONFIG),
        prompt_start="tokenizer",
        sequence_length=length or Companions.sequence_length,
    )
