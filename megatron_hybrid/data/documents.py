"""Reading documents from JSON lines, plain text and folders, in pieces that any process can take.

Bad documents never stop a reading: each comes out as a ``Skipped`` with its reason. A bad *file* (missing, unreadable, damaged gzip) does.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from io import BufferedIOBase
from pathlib import Path
from typing import Literal

from megatron_hybrid.data.indexed import CorpusError

_JSON_LINES_SUFFIXES = {".jsonl", ".ndjson", ".json"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InputFile:
    """A file to read documents from."""

    path: Path
    form: Literal["jsonl", "text"]
    """jsonl: one JSON object per line. text: the whole file is one document."""
    compressed: bool
    """Whether the file is gzip."""
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Slice:
    """The documents of a file that begin within a range of its bytes."""

    file: InputFile
    start: int
    stop: int


@dataclass(frozen=True)
class Document:
    """A document's text."""

    text: str


@dataclass(frozen=True)
class Skipped:
    """A document that cannot be used."""

    reason: str
    location: str
    """File and line."""


@dataclass(frozen=True)
class ReadOptions:
    """How documents are taken from files."""

    field: str = "text"
    """The JSON field that holds the text."""
    max_document_bytes: int = 64 << 20
    """Longer documents are skipped: they would have to stand in memory whole."""


def find_inputs(inputs: Sequence[Path | str], pattern: str = "*") -> list[InputFile]:
    """Return the files that ``inputs`` name, in that order and by path within each, every file once.

    Args:
        inputs: files; folders, read with all below them; or globs such as "books/**/*.txt". Names ending in .jsonl, .ndjson or .json, with
            or without .gz, are JSON lines, others text.
        pattern: which file names to take from folders, such as "*.py".

    Raises:
        CorpusError: an input does not exist or holds no such file.
    """
    found: dict[Path, None] = {}
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            matches = sorted(match for match in path.rglob(pattern) if match.is_file())
        elif path.exists():
            matches = [path]
        elif has_magic(str(given)):
            matches = [Path(match) for match in sorted(glob(str(given), recursive=True)) if Path(match).is_file()]
        else:
            raise CorpusError(f"input {given} does not exist")
        if not matches:
            raise CorpusError(
                f"input {given} holds no file that matches {pattern!r}" if path.is_dir() else f"input {given} matches no file"
            )
        found.update(dict.fromkeys(match.resolve() for match in matches))
    return [_describe(path) for path in found]


def plan_parts(files: Sequence[InputFile], part_size_bytes: int) -> list[tuple[Slice, ...]]:
    """Cut the inputs, in order, into parts of about ``part_size_bytes``: long JSON lines files by bytes, short files put together.

    gzip files and text files are never cut.
    """
    parts: list[tuple[Slice, ...]] = []
    open_part: list[Slice] = []
    open_size = 0
    for file in files:
        step = part_size_bytes if file.form == "jsonl" and not file.compressed else max(file.size_bytes, 1)
        for start in range(0, max(file.size_bytes, 1), step):
            stop = min(start + step, file.size_bytes)
            open_part.append(Slice(file, start, stop))
            open_size += stop - start
            if open_size >= part_size_bytes:
                parts.append(tuple(open_part))
                open_part, open_size = [], 0
    if open_part:
        parts.append(tuple(open_part))
    return parts


def read_documents(part: Slice, options: ReadOptions) -> Iterator[Document | Skipped]:
    """Yield the documents of a slice. The slices of a file give each of its documents exactly once.

    Raises:
        CorpusError: the file is damaged, or has changed size since ``find_inputs`` saw it.
        OSError: it cannot be read.
    """
    path = part.file.path
    if path.stat().st_size != part.file.size_bytes:
        raise CorpusError(f"{path} changed from {part.file.size_bytes} to {path.stat().st_size} bytes while it was being read; run again")
    with gzip.open(path, "rb") if part.file.compressed else open(path, "rb") as stream:
        try:
            if part.file.form == "jsonl":
                yield from _read_lines(stream, part, options)
            else:
                yield _read_text(stream, path, options)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise CorpusError(f"{path} is a damaged or truncated gzip file ({error}); replace it or leave it out") from error


def _describe(path: Path) -> InputFile:
    compressed = path.suffix == ".gz"
    name = path.with_suffix("") if compressed else path
    status = path.stat()
    form: Literal["jsonl", "text"] = "jsonl" if name.suffix in _JSON_LINES_SUFFIXES else "text"
    return InputFile(path, form, compressed, status.st_size, status.st_mtime_ns)


def _read_text(stream: BufferedIOBase, path: Path, options: ReadOptions) -> Document | Skipped:
    raw = stream.read(options.max_document_bytes + 1)
    if len(raw) > options.max_document_bytes:
        return Skipped("too long", str(path))
    return _checked(raw.removeprefix(_BYTE_ORDER_MARK), str(path))


def _read_lines(stream: BufferedIOBase, part: Slice, options: ReadOptions) -> Iterator[Document | Skipped]:
    line_number = 1
    if part.start > 0:
        # A line belongs to the slice in which it begins: skip the rest of the one that the slice before has begun.
        stream.seek(part.start - 1)
        _skip_line(stream)
    position = stream.tell()
    while part.file.compressed or position < part.stop:
        # A JSON string may spell a byte of text in six.
        line = stream.readline(6 * options.max_document_bytes)
        if not line:
            return
        where = f"{part.file.path}, line {line_number} from byte {part.start}" if part.start else f"{part.file.path}, line {line_number}"
        if len(line) == 6 * options.max_document_bytes and not line.endswith(b"\n"):
            _skip_line(stream)
            yield Skipped("too long", where)
        else:
            yield _parse_line(line.removeprefix(_BYTE_ORDER_MARK), where, options)
        position = stream.tell()
        line_number += 1


def _skip_line(stream: BufferedIOBase) -> None:
    while (block := stream.readline(1 << 20)) and not block.endswith(b"\n"):
        pass


def _parse_line(line: bytes, where: str, options: ReadOptions) -> Document | Skipped:
    if line.isspace():
        return Skipped("blank line", where)
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return Skipped("not UTF-8", where)
    except (ValueError, RecursionError):
        return Skipped("invalid JSON", where)
    if not isinstance(record, dict):
        return Skipped("not a JSON object", where)
    if options.field not in record:
        return Skipped(f"no field {options.field!r}", where)
    text = record[options.field]
    if not isinstance(text, str):
        return Skipped(f"field {options.field!r} is no string", where)
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError:
        return Skipped("unpaired surrogate", where)
    if len(raw) > options.max_document_bytes:
        return Skipped("too long", where)
    return Skipped("empty", where) if not text or text.isspace() else Document(text)


def _checked(raw: bytes, where: str) -> Document | Skipped:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return Skipped("not UTF-8", where)
    return Skipped("empty", where) if not text or text.isspace() else Document(text)
