"""The sample stream: every token once per epoch, boundaries where documents begin, one number as position."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.data.blend import Blend, BlendPhase
from megatron_hybrid.data.hashing import SeededShuffle
from megatron_hybrid.data.indexed import CorpusError, IndexedCorpus
from megatron_hybrid.data.source import SampleSource
from megatron_hybrid.data.stream import SampleStream, require_same_data

LENGTH = 16
EOD = 1


def random_documents(count: int, seed: int = 0) -> list[list[int]]:
    """Documents of 0 to 40 tokens and an end-of-document token; every ordinary token is one of a kind."""
    draw = np.random.default_rng(seed)
    tokens = iter(range(2, 10**6))
    return [[next(tokens) for _ in range(draw.integers(0, 40))] + [EOD] for _ in range(count)]


@pytest.fixture
def source(tmp_path: Path, write_corpus: Callable[..., Path]) -> SampleSource:
    return SampleSource("web", IndexedCorpus(write_corpus(tmp_path / "web", random_documents(50), 10**6)), LENGTH, seed=7)


def stream_of(*sources: SampleSource, reset: bool = False, seed: int = 7, phases: list[BlendPhase] | None = None) -> SampleStream:
    phases = phases or [BlendPhase(0, (1.0,) * len(sources))]
    return SampleStream(sources, Blend(phases, seed), LENGTH, seed, reset)


def test_an_epoch_is_the_shuffled_documents_one_after_another(source: SampleSource) -> None:
    documents = {tuple(source.corpus.read(number).tolist()) for number in range(source.corpus.num_documents)}
    orders = []
    for epoch in range(3):
        places = SeededShuffle(source.samples_per_epoch, "samples", 7, "web", epoch)
        shuffled = {places[index]: source.read(epoch * source.samples_per_epoch + index)[0] for index in range(source.samples_per_epoch)}
        samples = [shuffled[place] for place in range(source.samples_per_epoch)]
        for this, following in zip(samples, samples[1:], strict=False):
            assert this.size == LENGTH + 1 and this[-1] == following[0], "the last label is the next sample's first input"
        row = np.concatenate([sample[:-1] for sample in samples])
        assert source.corpus.num_tokens - 1 - row.size < LENGTH, "the tail is shorter than a sample"
        ends = np.flatnonzero(row == EOD) + 1
        found = [tuple(piece.tolist()) for piece in np.split(row, ends)[:-1]]
        assert set(found) <= documents
        orders.append(found)
    assert orders[0] != orders[1] != orders[2]


def test_a_long_document_is_spread_over_the_epoch(tmp_path: Path, write_corpus: Callable[..., Path]) -> None:
    long = [list(range(2, 2 + LENGTH * 100))]
    source = SampleSource("long", IndexedCorpus(write_corpus(tmp_path / "long", long, 10**6)), LENGTH, seed=0)
    starts = [source.read(index)[0][0] for index in range(99)]
    assert sum(later - earlier == LENGTH for earlier, later in zip(starts, starts[1:])) < 10


def test_corpus_of_exactly_one_sample(tmp_path: Path, write_corpus: Callable[..., Path]) -> None:
    exact = SampleSource("exact", IndexedCorpus(write_corpus(tmp_path / "exact", [list(range(LENGTH + 1))])), LENGTH, seed=0)
    assert exact.samples_per_epoch == 1
    assert exact.read(0)[0].tolist() == exact.read(5)[0].tolist() == list(range(LENGTH + 1))
    for documents in ([list(range(LENGTH))], []):
        short = IndexedCorpus(write_corpus(tmp_path / f"short{len(documents)}", documents))
        with pytest.raises(CorpusError, match=r"source 'short' .* tokens, but one sample takes sequence_length \+ 1 = 17"):
            SampleSource("short", short, LENGTH, seed=0)


def test_labels_follow_tokens(source: SampleSource) -> None:
    stream = stream_of(source)
    for index in range(100):
        sample = stream[index]
        assert [sample[key].dtype.name for key in ("tokens", "labels", "loss_mask", "segment_ids")] == [
            "int64",
            "int64",
            "float32",
            "int32",
        ]
        assert all(array.shape == (LENGTH,) for array in sample.values())
        assert (sample["tokens"][1:] == sample["labels"][:-1]).all()
        assert sample["loss_mask"].all() and not sample["segment_ids"].any()


def test_reset_marks_documents_and_foreign_labels(source: SampleSource) -> None:
    stream = stream_of(source, reset=True)
    for index in range(300):
        sample = stream[index]
        after_end = np.concatenate([[0], np.cumsum(sample["tokens"] == EOD)[:-1]])
        assert (sample["segment_ids"] == after_end).all()
        assert (sample["loss_mask"] == (sample["tokens"] != EOD)).all()


def test_reset_needs_no_end_tokens(tmp_path: Path, write_corpus: Callable[..., Path]) -> None:
    corpus = IndexedCorpus(write_corpus(tmp_path / "c", [[5] * 10, [], [6] * 10, [7] * 20]))
    stream = stream_of(SampleSource("c", corpus, LENGTH, seed=0), reset=True)
    for index in range(20):
        sample = stream[index]
        foreign = sample["tokens"] != sample["labels"]
        assert (sample["loss_mask"] == ~foreign).all()
        assert (np.diff(sample["segment_ids"]) == foreign[:-1]).all() and sample["segment_ids"][0] == 0


def test_stream_follows_the_blend(tmp_path: Path, write_corpus: Callable[..., Path]) -> None:
    sources = [
        SampleSource(name, IndexedCorpus(write_corpus(tmp_path / name, [[token] * 400])), LENGTH, seed=0)
        for name, token in (("a", 10), ("b", 20))
    ]
    stream = stream_of(*sources, phases=[BlendPhase(0, (3.0, 1.0)), BlendPhase(1024, (0.0, 1.0))])
    drawn = [int(stream[index]["tokens"][0]) for index in range(2048)]
    assert drawn[:1024].count(10) == 768 and drawn[1024:].count(10) == 0
    usage = stream.usage(0, 2048)
    assert [(use.source, use.samples) for use in usage] == [("a", 768), ("b", 1280)]
    assert usage[0].share == 768 / 2048 and usage[0].epochs == 768 / sources[0].samples_per_epoch


def test_samples_depend_on_nothing_but_the_index(source: SampleSource) -> None:
    first = [stream_of(source)[index]["tokens"] for index in range(200)]
    fresh = stream_of(SampleSource("web", source.corpus, LENGTH, seed=7))
    for index in reversed(range(200)):
        assert (fresh[index]["tokens"] == first[index]).all()
    other_seed = stream_of(SampleSource("web", source.corpus, LENGTH, seed=8), seed=8)
    assert any((other_seed[index]["tokens"] != first[index]).any() for index in range(5))


def test_fingerprint_survives_json_and_moved_files(source: SampleSource, tmp_path: Path, write_corpus: Callable[..., Path]) -> None:
    saved = json.loads(json.dumps(stream_of(source).fingerprint()))
    moved = SampleSource("web", IndexedCorpus(write_corpus(tmp_path / "elsewhere" / "web", random_documents(50), 10**6)), LENGTH, seed=7)
    require_same_data(saved, stream_of(moved).fingerprint())


def test_another_stream_is_refused_and_the_difference_named(
    source: SampleSource, tmp_path: Path, write_corpus: Callable[..., Path]
) -> None:
    saved = stream_of(source).fingerprint()
    documents = random_documents(50)
    documents[20] = [EOD, *documents[20][:-1]]
    changed = SampleSource("web", IndexedCorpus(write_corpus(tmp_path / "changed", documents, 10**6)), LENGTH, seed=7)
    renamed = SampleSource("books", source.corpus, LENGTH, seed=7)
    for stream, message in [
        (stream_of(source, seed=8), "data.seed was 7, is 8"),
        (stream_of(source, reset=True), "data.reset_at_documents was False, is True"),
        (stream_of(changed), "data.sources.web was "),
        (stream_of(renamed), r"data.sources.web was .*, is absent; data.sources.books was absent"),
        (stream_of(source, phases=[BlendPhase(0, (2.0,))]), r"data.phases\[0\].blend.web was 1.0, is 2.0"),
        (stream_of(source, phases=[BlendPhase(0, (1.0,)), BlendPhase(9, (1.0,))]), "data.phases was "),
    ]:
        with pytest.raises(ValueError, match=f"another data stream.*{message}"):
            require_same_data(saved, stream.fingerprint())
