"""Files of ours are the library's, and the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hybrid.convert.safetensors_file import SafetensorsReader, SafetensorsWriter
from megatron_hybrid.convert.specs import TensorSpec

TENSORS = {
    "matrix": torch.randn(5, 7),
    "narrow": torch.randn(3, 1, 4).bfloat16(),
    "half": torch.randn(9).half(),
    "none": torch.empty(0, 4),
    "last": torch.arange(6.0),
}
SPECS = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def write(path: Path, names: list[str], num_written: int = 0) -> None:
    writer = SafetensorsWriter(path, SPECS, num_written)
    for name in names:
        writer.write(name, TENSORS[name])
    writer.close()


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", list(TENSORS))
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    reader = SafetensorsReader(tmp_path / "a.safetensors")
    assert reader.specs == SPECS
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in TENSORS.items())


def test_an_interrupted_file_is_continued(tmp_path: Path) -> None:
    write(tmp_path / "whole", list(TENSORS))
    write(tmp_path / "parts", ["matrix", "narrow", "half"])
    # The third was perhaps not on the disk, so it is written again.
    write(tmp_path / "parts", list(TENSORS)[2:], num_written=2)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_damaged_files_are_refused_by_tensor(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write(file, list(TENSORS))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="is truncated: .* and last would lie beyond"):
        SafetensorsReader(file)
    file.write_bytes(whole[:20])
    with pytest.raises(ValueError, match="its header is damaged"):
        SafetensorsReader(file)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="is no safetensors file"):
        SafetensorsReader(file)
