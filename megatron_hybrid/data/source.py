"""One corpus as an endless row of equally long samples."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from megatron_hybrid.data.hashing import SeededShuffle, seeded_permutation
from megatron_hybrid.data.indexed import CorpusError, IndexedCorpus

_CACHED_EPOCHS = 2
_DIGEST_SPANS = 16
_DIGEST_TOKENS = 4096


@dataclass(frozen=True)
class _Epoch:
    """The order of the documents, and then of the samples cut from them, in one pass over a corpus."""

    documents: np.ndarray
    """Document at each place, [num_documents]."""
    ends: np.ndarray
    """Tokens up to and with each place, int64 [num_documents]."""
    samples: SeededShuffle
    """Place of each sample in the row of documents."""


class SampleSource:
    """Samples of ``sequence_length`` tokens from the documents of a corpus, shuffled anew for every epoch.

    Sample ``i`` is sample ``i mod S`` of epoch ``i div S``, with ``S = (tokens - 1) div sequence_length`` samples per epoch. An epoch puts
    its documents one after another in a shuffled order and cuts them into samples ``k``: the tokens ``k L`` to ``k L + L`` (included: the
    last one is only a label). The samples come in a shuffled order of their own, so that a batch is not one long document's pieces. What
    remains at the end of an epoch, less than a sample, is not seen in it; in the next, with another order of documents, it is other text.

    Memory: 16 bytes per document for each of two cached epochs, built when first asked for.

    Raises:
        CorpusError: the corpus holds less than one sample.
    """

    def __init__(self, name: str, corpus: IndexedCorpus, sequence_length: int, seed: int) -> None:
        if corpus.num_tokens <= sequence_length:
            raise CorpusError(
                f"source {name!r} ({corpus.prefix}) has {corpus.num_tokens} tokens, but one sample takes "
                f"sequence_length + 1 = {sequence_length + 1}; give it more text or lower data.sequence_length"
            )
        self.name = name
        self.corpus = corpus
        self.samples_per_epoch = (corpus.num_tokens - 1) // sequence_length
        self._sequence_length = sequence_length
        self._seed = seed
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the L + 1 tokens of a sample and the places in it, 0 left out, at which documents begin (both int64)."""
        number, sample = divmod(index, self.samples_per_epoch)
        epoch = self._epoch(number)
        start = epoch.samples[sample] * self._sequence_length
        stop = start + self._sequence_length + 1
        first, last = np.searchsorted(epoch.ends, (start, stop - 1), side="right")
        corpus = self.corpus
        tokens = np.empty(stop - start, dtype=np.int64)
        filled = 0
        for row in range(first, last + 1):
            document = epoch.documents[row]
            begin, end = corpus.document_starts[document], corpus.document_starts[document + 1]
            # Positions of the epoch's row of tokens and of the corpus differ by a constant inside a document.
            offset = begin - (epoch.ends[row] - (end - begin))
            piece = corpus.tokens[start + filled + offset : min(end, stop + offset)]
            tokens[filled : filled + piece.size] = piece
            filled += piece.size
        assert filled == tokens.size, "a sample lies within its epoch"
        boundaries = epoch.ends[first:last] - start
        return tokens, boundaries

    def digest(self) -> str:
        """Return a hash of the corpus's size, of its document lengths and of spans of tokens spread over it; it tells corpora apart without
        reading them whole.
        """
        corpus = self.corpus
        summary = hashlib.sha256(f"{corpus.dtype} {corpus.num_tokens} {corpus.num_documents}".encode())
        for array in (corpus.tokens, corpus.document_starts):
            for start in np.linspace(0, array.size, _DIGEST_SPANS, endpoint=False, dtype=np.int64):
                summary.update(np.ascontiguousarray(array[start : start + _DIGEST_TOKENS]).data)
        return summary.hexdigest()

    def _epoch(self, number: int) -> _Epoch:
        with self._lock:
            if number not in self._epochs:
                documents = seeded_permutation(self.corpus.num_documents, "documents", self._seed, self.name, number)
                ends = np.cumsum(self.corpus.document_lengths[documents])
                samples = SeededShuffle(self.samples_per_epoch, "samples", self._seed, self.name, number)
                self._epochs[number] = _Epoch(documents, ends, samples)
                if len(self._epochs) > _CACHED_EPOCHS:
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(number)
            return self._epochs[number]
