"""Building the parts of a corpus: one part in one process, or many over a pool of processes.

A part is a small corpus of its own plus a JSON file of counts, written last: where that file is, the part is finished and never built
    again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

from megatron_hybrid.data.documents import ReadOptions, Skipped, Slice, read_documents
from megatron_hybrid.data.indexed import CorpusError, IndexedCorpus, IndexedWriter
from megatron_hybrid.data.report import save_json
from megatron_hybrid.data.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1 << 20
_NUM_EXAMPLES = 3


@dataclass
class SkipCounts:
    """Documents left out, by reason, with where the first few stand."""

    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, count: int, locations: Sequence[str]) -> None:
        """Count ``count`` more documents left out for ``reason``."""
        self.skipped[reason] = self.skipped.get(reason, 0) + count
        examples = self.examples.setdefault(reason, [])
        examples.extend(locations[: _NUM_EXAMPLES - len(examples)])


@dataclass(frozen=True)
class PartBuilder:
    """Tokenises parts into a folder. Pickles, so that each worker process has its own."""

    folder: Path
    tokenizer: Tokenizer
    options: ReadOptions
    holdout: float
    """Share of the documents that go to the second corpus, chosen by a hash of their text."""

    def corpus_prefix(self, number: int, split: str) -> Path:
        """Return the path prefix of one part's corpus; ``split`` is "main" or "holdout"."""
        return self.folder / f"{number:06d}.{split}"

    def is_finished(self, number: int) -> bool:
        """Return whether a part was committed and its files are sound."""
        try:
            for split in self.splits():
                IndexedCorpus(self.corpus_prefix(number, split))
        except CorpusError:
            return False
        return self._counts_path(number).exists()

    def counts(self, number: int) -> SkipCounts:
        """Return the counts of a finished part."""
        return SkipCounts(**json.loads(self._counts_path(number).read_text(encoding="utf-8")))

    def splits(self) -> tuple[str, ...]:
        """Return the corpora that a part has."""
        return ("main", "holdout") if self.holdout > 0 else ("main",)

    def build(self, number: int, slices: tuple[Slice, ...]) -> None:
        """Tokenise one part and commit it: its counts are written when everything else is there.

        Raises:
            CorpusError: an input file is damaged.
            OSError: the disk is full, or an input cannot be read.
        """
        self._counts_path(number).unlink(missing_ok=True)
        counts = SkipCounts()
        held_out_corpus = self.corpus_prefix(number, "holdout") if self.holdout > 0 else None
        with IndexedWriter(self.corpus_prefix(number, "main"), self.tokenizer.vocab_size) as main:
            if held_out_corpus is None:
                self._fill(slices, counts, main, None)
            else:
                with IndexedWriter(held_out_corpus, self.tokenizer.vocab_size) as held_out:
                    self._fill(slices, counts, main, held_out)
        save_json(self._counts_path(number), asdict(counts))

    def _counts_path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"

    def _fill(self, slices: tuple[Slice, ...], counts: SkipCounts, main: IndexedWriter, held_out: IndexedWriter | None) -> None:
        batch: list[str] = []
        batch_characters = 0
        for piece in slices:
            for item in read_documents(piece, self.options):
                if isinstance(item, Skipped):
                    counts.add(item.reason, 1, [item.location])
                    continue
                batch.append(item.text)
                batch_characters += len(item.text)
                if batch_characters >= _BATCH_CHARACTERS:
                    self._write(batch, main, held_out)
                    batch, batch_characters = [], 0
        self._write(batch, main, held_out)

    def _write(self, batch: list[str], main: IndexedWriter, held_out: IndexedWriter | None) -> None:
        if held_out is None:
            self._write_split(batch, main)
            return
        chosen = [_is_held_out(text, self.holdout) for text in batch]
        self._write_split([text for text, out in zip(batch, chosen, strict=True) if not out], main)
        self._write_split([text for text, out in zip(batch, chosen, strict=True) if out], held_out)

    def _write_split(self, texts: list[str], writer: IndexedWriter) -> None:
        eod = np.array([self.tokenizer.eod_id], dtype=np.int32)
        pieces = [piece for tokens in self.tokenizer.encode_batch(texts) for piece in (tokens, eod)]
        if pieces:
            lengths = np.array([len(tokens) + 1 for tokens in pieces[::2]])
            writer.add_documents(np.concatenate(pieces), lengths)


def build_parts(builder: PartBuilder, jobs: Sequence[tuple[int, tuple[Slice, ...]]], num_workers: int, done: Callable[[int], None]) -> None:
    """Build every part of ``jobs`` (number, slices) and call ``done`` with the number of each as it is committed.

    Raises:
        CorpusError, OSError: what a part raised; the parts committed before stay. CorpusError also where a worker process died.
    """
    if num_workers == 1 or len(jobs) == 1:
        for number, slices in jobs:
            builder.build(number, slices)
            done(number)
        return
    # spawn: forking a parent that runs threads (torch, tokenizers) can lock up the child.
    context = multiprocessing.get_context("spawn")
    waiting = iter(jobs)
    workers: dict[Connection, multiprocessing.process.BaseProcess] = {}
    try:
        for _ in range(min(num_workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, builder), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
            ours.send(next(waiting))
        while workers:
            ready = wait(list(workers))
            for connection in [held for held in workers if held in ready]:
                _take_result(connection, workers[connection], done)
                job = next(waiting, None)
                if job is not None:
                    connection.send(job)
                else:
                    connection.close()
                    workers.pop(connection).join()
    finally:
        for connection, process in workers.items():
            process.terminate()
            process.join()
            connection.close()


def _take_result(connection: Connection, process: multiprocessing.process.BaseProcess, done: Callable[[int], None]) -> None:
    try:
        result = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        raise CorpusError(
            f"a worker process died (exit code {process.exitcode}; -9 is usually a lack of memory): run the same command again, with fewer "
            "workers if memory was short; finished parts are kept"
        ) from None
    if isinstance(result, BaseException):
        raise result
    done(result)


def _serve(connection: Connection, builder: PartBuilder) -> None:
    """Body of a worker: build what the parent sends until it closes the connection, which it also does by dying."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        while True:
            number, slices = connection.recv()
            try:
                builder.build(number, slices)
            except Exception as error:
                connection.send(error)
            else:
                connection.send(number)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _is_held_out(text: str, share: float) -> bool:
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2.0**64
