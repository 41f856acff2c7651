"""The .bin/.idx format: compatible with megatron-core in both directions, and clear about damage."""

from __future__ import annotations

import errno
import importlib
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from megatron_hybrid.data.indexed import CorpusError, IndexedCorpus, IndexedWriter, bin_path, idx_path, token_dtype

DOCUMENTS = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9], [10, 11]]


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    """megatron-core's own reader and builder."""
    importlib.import_module("megatron_hybrid.substrate")
    return importlib.import_module("megatron.core.datasets.indexed_dataset")


@pytest.mark.parametrize("vocab_size", [100, 65499, 65500, 131072])
def test_megatron_opens_ours(tmp_path: Path, write_corpus: Callable[..., Path], megatron: ModuleType, vocab_size: int) -> None:
    prefix = write_corpus(tmp_path / "ours", DOCUMENTS, vocab_size)
    theirs = megatron.IndexedDataset(str(prefix))
    assert theirs.index.dtype == megatron.DType.optimal_dtype(vocab_size) == token_dtype(vocab_size)
    assert [list(map(int, theirs[i])) for i in range(len(theirs))] == DOCUMENTS
    assert list(theirs.document_indices) == list(range(len(DOCUMENTS) + 1))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_we_open_megatrons(tmp_path: Path, megatron: ModuleType, dtype: type[np.integer]) -> None:
    prefix = tmp_path / "theirs"
    builder = megatron.IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(str(idx_path(prefix)))
    ours = IndexedCorpus(prefix)
    assert ours.dtype == dtype
    assert [ours.read(i).tolist() for i in range(ours.num_documents)] == DOCUMENTS


def test_files_equal_megatrons_to_the_byte(tmp_path: Path, write_corpus: Callable[..., Path], megatron: ModuleType) -> None:
    prefix, theirs = write_corpus(tmp_path / "ours", DOCUMENTS, 100), tmp_path / "theirs"
    builder = megatron.IndexedDatasetBuilder(str(bin_path(theirs)), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(str(idx_path(theirs)))
    assert bin_path(prefix).read_bytes() == bin_path(theirs).read_bytes()
    assert idx_path(prefix).read_bytes() == idx_path(theirs).read_bytes()


def test_documents_of_several_sequences(tmp_path: Path, megatron: ModuleType) -> None:
    prefix = tmp_path / "theirs"
    builder = megatron.IndexedDatasetBuilder(str(bin_path(prefix)))
    builder.add_item(torch.tensor([1, 2]))
    builder.add_item(torch.tensor([3]))
    builder.end_document()
    builder.add_item(torch.tensor([4]))
    builder.end_document()
    builder.finalize(str(idx_path(prefix)))
    corpus = IndexedCorpus(prefix)
    assert [corpus.read(0).tolist(), corpus.read(1).tolist()] == [[1, 2, 3], [4]]


def test_reads_ranges_without_copying(tmp_path: Path, write_corpus: Callable[..., Path]) -> None:
    corpus = IndexedCorpus(write_corpus(tmp_path / "c", DOCUMENTS))
    assert corpus.read(3, 1, 4).tolist() == [6, 7, 8]
    assert np.shares_memory(corpus.read(3, 1, 4), corpus.tokens) and not corpus.tokens.flags.writeable
    assert (corpus.num_tokens, corpus.num_documents, corpus.document_lengths.tolist()) == (11, 5, [3, 1, 0, 5, 2])
    for document, start, stop in [(5, 0, 1), (-1, 0, 1), (3, 0, 6), (3, 4, 3)]:
        with pytest.raises(IndexError):
            corpus.read(document, start, stop)


def test_joining_corpora_equals_writing_at_once(tmp_path: Path, write_corpus: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_hybrid.data.indexed._COPY_TOKENS", 4)
    pieces = [write_corpus(tmp_path / "a", DOCUMENTS[:2]), write_corpus(tmp_path / "b", []), write_corpus(tmp_path / "c", DOCUMENTS[2:])]
    with IndexedWriter(tmp_path / "joined", 1000) as writer:
        for piece in pieces:
            writer.add_corpus(IndexedCorpus(piece))
    whole = write_corpus(tmp_path / "whole", DOCUMENTS)
    assert bin_path(tmp_path / "joined").read_bytes() == bin_path(whole).read_bytes()
    assert idx_path(tmp_path / "joined").read_bytes() == idx_path(whole).read_bytes()


@pytest.mark.parametrize("token", [-1, 1000])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, write_corpus: Callable[..., Path], token: int) -> None:
    with pytest.raises(CorpusError, match=rf"token id {token} for .*c\.bin lies outside the vocabulary of 1000"):
        write_corpus(tmp_path / "c", [[1], [token]])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_and_truncated_files_are_named(tmp_path: Path, write_corpus: Callable[..., Path], suffix: str) -> None:
    prefix = write_corpus(tmp_path / "c", DOCUMENTS)
    path = tmp_path / f"c{suffix}"
    content = path.read_bytes()
    for keep in [*range(0, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:keep])
        with pytest.raises(CorpusError, match=rf"c\{suffix}"):
            IndexedCorpus(prefix)
    path.write_bytes(content + b"\x00\x00")
    with pytest.raises(CorpusError, match=rf"c\{suffix}"):
        IndexedCorpus(prefix)
    path.unlink()
    with pytest.raises(CorpusError, match=rf"c\{suffix} does not exist"):
        IndexedCorpus(prefix)


@pytest.mark.parametrize(("offset", "value", "message"), [(0, 88, "no Megatron index"), (9, 2, "index version 2"), (17, 7, "dtype code 7")])
def test_foreign_index_is_refused(tmp_path: Path, write_corpus: Callable[..., Path], offset: int, value: int, message: str) -> None:
    prefix = write_corpus(tmp_path / "c", DOCUMENTS)
    content = bytearray(idx_path(prefix).read_bytes())
    content[offset] = value
    idx_path(prefix).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        IndexedCorpus(prefix)


def test_index_of_another_corpus_is_refused(tmp_path: Path, write_corpus: Callable[..., Path]) -> None:
    prefix, other = write_corpus(tmp_path / "c", DOCUMENTS), write_corpus(tmp_path / "d", DOCUMENTS[:3])
    idx_path(other).replace(idx_path(prefix))
    with pytest.raises(CorpusError, match=r"c\.bin holds 22 bytes but .*c\.idx describes 8"):
        IndexedCorpus(prefix)


def test_an_error_leaves_nothing_behind_and_keeps_the_old_corpus(tmp_path: Path, write_corpus: Callable[..., Path]) -> None:
    prefix = write_corpus(tmp_path / "c", DOCUMENTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), IndexedWriter(prefix, 1000) as writer:
        writer.add_documents(np.array([1]), np.array([1]))
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    # In a process of its own: the limit on file sizes would hold for the whole test run.
    script = """
import resource, sys, numpy as np
from pathlib import Path
from megatron_hybrid.data.indexed import IndexedWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with IndexedWriter(Path(sys.argv[1]), 1000) as writer:
        for _ in range(100):
            writer.add_documents(np.zeros(10_000, dtype=np.int64), np.array([10_000]))
except OSError as error:
    print(error.errno, error)
"""
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path / "c")], capture_output=True, text=True, check=True)
    assert result.stdout.startswith(f"{errno.EFBIG} ") and "c.bin" in result.stdout and "run the same command again" in result.stdout
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
