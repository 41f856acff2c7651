"""What a checkpoint consists of, and whether it still does: ``manifest.json``.

Files have a size and a CRC-32: checkpoints are damaged by accident, not by design, and zlib's CRC is three times as fast as the fastest
cryptographic hash of the standard library, while it finds every error burst of up to 32 bits. Tensors have a shape, a dtype and a
digest that no layout changes (see ``digest``), so that what was loaded into any other layout can be compared.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_hybrid.checkpoint.agreement import CheckpointError, failing_together

MANIFEST = "manifest.json"
_BYTES_PER_READ = 1 << 22


@dataclass(frozen=True)
class FileFacts:
    """One file of a checkpoint."""

    size_bytes: int
    crc32: str
    """Eight hexadecimal digits."""


@dataclass(frozen=True)
class TensorFacts:
    """One whole tensor, over all its shards."""

    shape: tuple[int, ...]
    dtype: str
    """torch's name, such as bfloat16."""
    digest: str
    """Sixteen hexadecimal digits; see ``digest``."""


@dataclass(frozen=True)
class Manifest:
    """Every file but the manifest itself by name, and every tensor by its key."""

    files: dict[str, FileFacts]
    tensors: dict[str, TensorFacts]

    def to_text(self) -> str:
        """Return the file's text: JSON, with a CRC-32 of itself."""
        fields = asdict(self)
        return json.dumps({"crc32": _crc32_of(fields), **fields}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read the manifest of the checkpoint in directory ``path``.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        file = path / MANIFEST
        try:
            fields = json.loads(file.read_text(encoding="ascii"))
            intact = fields.pop("crc32") == _crc32_of(fields)
        except FileNotFoundError:
            raise CheckpointError(f"{file} is missing") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            intact = False
        if not intact:
            raise CheckpointError(f"{file} is damaged: its CRC-32 differs")
        return cls(
            files={name: FileFacts(**facts) for name, facts in fields["files"].items()},
            tensors={key: TensorFacts(tuple(facts["shape"]), facts["dtype"], facts["digest"]) for key, facts in fields["tensors"].items()},
        )


def measure(file: Path) -> FileFacts:
    """Read a file and return what the manifest says of it."""
    size_bytes = crc32 = 0
    with file.open("rb") as stream:
        while block := stream.read(_BYTES_PER_READ):
            size_bytes += len(block)
            crc32 = zlib.crc32(block, crc32)
    return FileFacts(size_bytes, f"{crc32:08x}")


def check_sizes(path: Path, manifest: Manifest) -> None:
    """Compare the size of every file with the manifest, without reading any.

    Raises:
        CheckpointError: files are missing or of another size; the message names them.
    """
    problems = []
    for name, facts in manifest.files.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif (size_bytes := file.stat().st_size) != facts.size_bytes:
            problems.append(f"{file} is damaged: it has {size_bytes} bytes, {facts.size_bytes} were written")
    _raise_all(problems)


def check_contents(path: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Read the named files and compare them with the manifest.

    Raises:
        CheckpointError: files are damaged; the message names them.
    """
    _raise_all([f"{path / name} is damaged: its CRC-32 differs" for name in names if measure(path / name) != manifest.files[name]])


def verify_files(path: Path, group: dist.ProcessGroup | None = None) -> Manifest:
    """Read the whole checkpoint once, shared among the ranks of ``group``, and return its manifest; collective.

    Raises:
        CheckpointError: it is not what was written; the message names the files.
    """

    with failing_together(group):
        manifest = Manifest.read(path)
        check_sizes(path, manifest)
        by_size = sorted(manifest.files, key=lambda name: (manifest.files[name].size_bytes, name), reverse=True)
        check_contents(path, manifest, by_size[dist.get_rank(group) :: dist.get_world_size(group)])
    return manifest


def _crc32_of(fields: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(fields).encode()):08x}"


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise CheckpointError("; ".join(problems))
