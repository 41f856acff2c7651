"""Megatron's indexed corpora: PREFIX.bin holds the token ids of all documents one after another, PREFIX.idx says where each begins.

Layout of the index, little endian: the magic ``MMIDIDX\\0\\0``, version (uint64, 1), dtype code (uint8), number of sequences S (uint64),
length of the document table D + 1 (uint64); then S sequence lengths in tokens (int32), S byte offsets into PREFIX.bin (int64) and the
D + 1 sequence numbers at which documents begin and the last one ends (int64). We write one sequence per document and read any number.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_OF_CODE = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODE_OF_DTYPE = {np.dtype(dtype): code for code, dtype in _DTYPE_OF_CODE.items()}
_SMALL_VOCABULARY = 65500
_COPY_TOKENS = 1 << 22
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CorpusError(ValueError):
    """A corpus, or a file it is made from or into, cannot be used; the message names the file and what to do."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the storage type of token ids by Megatron's rule: uint16 below 65,500 ids, int32 from there on."""
    return np.dtype(np.uint16 if vocab_size < _SMALL_VOCABULARY else np.int32)


def bin_path(prefix: Path) -> Path:
    """Return the path of the token ids of the corpus at ``prefix``."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Return the path of the index of the corpus at ``prefix``."""
    return prefix.with_name(prefix.name + ".idx")


class IndexedCorpus:
    """A corpus opened for reading. Both files are memory-mapped; what is read is a view into the map, never a copy.

    Attributes:
        prefix: path prefix of the two files.
        tokens: the ids of all documents one after another, [num_tokens], of the corpus's integer type, read-only.
        document_starts: position in ``tokens`` of each document, and the total at the end, int64 [num_documents + 1].

    Raises:
        CorpusError: a file is missing, truncated, of another format, or the two do not belong together.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index_bytes = _map(idx_path(prefix), prefix)
        data_bytes = _map(bin_path(prefix), prefix)
        dtype, lengths, pointers, documents = _parse_index(index_bytes, idx_path(prefix))
        bounds = np.append(pointers, data_bytes.size)
        if not np.array_equal(np.diff(bounds), lengths * np.int64(dtype.itemsize)) or bounds[0] != 0:
            expected = int(lengths.sum(dtype=np.int64)) * dtype.itemsize
            raise CorpusError(
                f"{bin_path(prefix)} holds {data_bytes.size} bytes but {idx_path(prefix)} describes {expected}: one of them is "
                "truncated or belongs to another corpus; build the corpus again"
            )
        if documents[0] != 0 or documents[-1] != len(lengths) or np.any(np.diff(documents) < 0):
            raise CorpusError(f"{idx_path(prefix)} is damaged: its document table does not cover its sequences; build the corpus again")
        self.tokens = data_bytes.view(dtype)
        self.document_starts = bounds[documents] // dtype.itemsize

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents together."""
        return self.tokens.size

    @property
    def num_documents(self) -> int:
        """Documents in the corpus."""
        return len(self.document_starts) - 1

    @property
    def dtype(self) -> np.dtype:
        """Integer type of the stored ids."""
        return self.tokens.dtype

    @property
    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [num_documents]."""
        return np.diff(self.document_starts)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return tokens ``start`` to ``stop`` (unset: the end) of a document as a view, [stop - start].

        Raises:
            IndexError: there is no such document, or the range leaves it.
        """
        if not 0 <= document < self.num_documents:
            raise IndexError(f"{self.prefix} has documents 0 to {self.num_documents - 1}, not {document}")
        first, end = int(self.document_starts[document]), int(self.document_starts[document + 1])
        stop = end - first if stop is None else stop
        if not 0 <= start <= stop <= end - first:
            raise IndexError(f"document {document} of {self.prefix} has {end - first} tokens; {start} to {stop} leaves it")
        return self.tokens[first + start : first + stop]


class IndexedWriter:
    """Writes a corpus in bounded memory; a context manager.

    The files appear under their names when the block ends without an error, the index last, so a corpus whose index is there is whole.
    After an error nothing is left behind. Lengths wait in a file beside the others, not in memory.

    Args:
        prefix: path prefix of the two files; its folder is made if need be.
        vocab_size: ids must lie below it; it also decides the storage type (``token_dtype``).

    Raises:
        CorpusError: a token id lies outside the vocabulary.
        OSError: the disk is full or not writable; names the file.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._prefix = prefix
        self._vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.num_documents = 0
        self.num_tokens = 0
        self.max_token_id = -1
        self._bin_partial = bin_path(prefix).with_suffix(".bin.partial")
        self._idx_partial = idx_path(prefix).with_suffix(".idx.partial")
        self._lengths_partial = idx_path(prefix).with_suffix(".lengths.partial")

    def __enter__(self) -> IndexedWriter:
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        self._data = open(self._bin_partial, "wb")
        self._lengths = open(self._lengths_partial, "w+b")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for stream in (self._data, self._lengths):
                _close_quietly(stream)
            for path in (self._bin_partial, self._idx_partial, self._lengths_partial):
                path.unlink(missing_ok=True)

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents given one after another: ``tokens`` [sum of lengths], any integer type; ``lengths`` [documents] in tokens."""
        assert int(lengths.sum(dtype=np.int64)) == tokens.size, "lengths do not add up to the tokens given"
        if tokens.size:
            lowest, highest = int(tokens.min()), int(tokens.max())
            if lowest < 0 or highest >= self._vocab_size:
                culprit = lowest if lowest < 0 else highest
                raise CorpusError(f"token id {culprit} for {bin_path(self._prefix)} lies outside the vocabulary of {self._vocab_size}")
            self.max_token_id = max(self.max_token_id, highest)
        with naming_full_disk(self._bin_partial):
            self._data.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        with naming_full_disk(self._lengths_partial):
            self._lengths.write(np.ascontiguousarray(lengths, dtype=np.int32).data)
        self.num_documents += len(lengths)
        self.num_tokens += tokens.size

    def add_corpus(self, corpus: IndexedCorpus) -> None:
        """Append every document of another corpus, a few megabytes at a time."""
        starts = corpus.document_starts
        first = 0
        while first < corpus.num_documents:
            # At least one document, however long: lengths and tokens are always handed over together.
            end = max(first + 1, int(np.searchsorted(starts, starts[first] + _COPY_TOKENS, side="right")) - 1)
            self.add_documents(corpus.tokens[starts[first] : starts[end]], np.diff(starts[first : end + 1]))
            first = end

    def _finish(self) -> None:
        with naming_full_disk(self._bin_partial):
            _flush(self._data)
        with naming_full_disk(self._idx_partial), open(self._idx_partial, "wb") as index:
            index.write(_HEADER.pack(_MAGIC, _VERSION, _CODE_OF_DTYPE[self.dtype], self.num_documents, self.num_documents + 1))
            for lengths in self._stored_lengths():
                index.write(lengths.data)
            position = 0
            for lengths in self._stored_lengths():
                ends = position + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
                index.write((ends - lengths * np.int64(self.dtype.itemsize)).data)
                position = int(ends[-1])
            for first in range(0, self.num_documents + 1, _COPY_TOKENS):
                index.write(np.arange(first, min(first + _COPY_TOKENS, self.num_documents + 1), dtype=np.int64).data)
            _flush(index)
        # An index left from an earlier build must not stand beside the new tokens, not even for a moment.
        idx_path(self._prefix).unlink(missing_ok=True)
        os.replace(self._bin_partial, bin_path(self._prefix))
        os.replace(self._idx_partial, idx_path(self._prefix))

    def _stored_lengths(self) -> Iterator[np.ndarray]:
        with naming_full_disk(self._lengths_partial):
            self._lengths.flush()
        self._lengths.seek(0)
        while block := self._lengths.read(_COPY_TOKENS):
            yield np.frombuffer(block, dtype=np.int32)


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn the operating system's bare "no space left" into an error that names the file being written and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL_DISK:
            raise
        raise OSError(error.errno, f"{os.strerror(error.errno)}: make room and run the same command again", str(path)) from error


def _flush(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _close_quietly(stream: BinaryIO) -> None:
    # On a full disk close() tries the failed flush once more; the first error is the one to report.
    with suppress(OSError):
        stream.close()


def _map(path: Path, prefix: Path) -> np.ndarray:
    """Return the file's bytes as a read-only map, uint8 [size]."""
    try:
        with open(path, "rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                return np.empty(0, dtype=np.uint8)
            return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    except FileNotFoundError:
        raise CorpusError(
            f"{path} does not exist: a corpus is the pair PREFIX.bin and PREFIX.idx with PREFIX={prefix}; check the path, or build the "
            "corpus with tools.preprocess_data"
        ) from None
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from error


def _parse_index(content: np.ndarray, path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Return (token type, sequence lengths, byte offsets, document table) as views into ``content``."""
    if content.size < _HEADER.size:
        raise CorpusError(
            f"{path} is truncated: {content.size} bytes are less than the {_HEADER.size} of an index header; build the corpus again"
        )
    magic, version, code, num_sequences, num_bounds = _HEADER.unpack(content[: _HEADER.size].tobytes())
    if magic != _MAGIC:
        raise CorpusError(f"{path} is no Megatron index: it begins with {magic!r}, expected {_MAGIC!r}")
    if version != _VERSION:
        raise CorpusError(f"{path} has index version {version}, expected {_VERSION}")
    if code not in _DTYPE_OF_CODE:
        raise CorpusError(f"{path} has dtype code {code}, which is no integer type (known: {sorted(_DTYPE_OF_CODE)})")
    expected = _HEADER.size + num_sequences * (4 + 8) + num_bounds * 8
    if content.size == expected + num_sequences > expected:
        raise CorpusError(f"{path} carries sequence modes: a multimodal corpus, which is not supported")
    if content.size != expected or num_bounds == 0:
        raise CorpusError(f"{path} is truncated or damaged: it has {content.size} bytes, expected {expected}; build the corpus again")
    lengths_end = _HEADER.size + 4 * num_sequences
    pointers_end = lengths_end + 8 * num_sequences
    lengths = np.frombuffer(content[_HEADER.size : lengths_end], dtype="<i4")
    pointers = np.frombuffer(content[lengths_end:pointers_end], dtype="<i8")
    documents = np.frombuffer(content[pointers_end:], dtype="<i8")
    return np.dtype(_DTYPE_OF_CODE[code]), lengths, pointers, documents
