"""From configuration to streams: phases at their places, and every bad input refused before training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hybrid.config.schema import RunConfig
from megatron_hybrid.data.build import build_train_stream, build_validation_streams, describe_blend
from megatron_hybrid.data.corpus import prepare_corpus
from megatron_hybrid.data.indexed import bin_path, idx_path
from megatron_hybrid.data.tokenizer import SentencePieceTokenizer

MakeConfig = Callable[..., RunConfig]
WriteCorpus = Callable[..., Path]


@pytest.fixture
def corpora(tmp_path: Path, write_corpus: WriteCorpus) -> dict[str, Path]:
    return {
        "web": write_corpus(tmp_path / "web", [[10] * 100] * 30),
        "code": write_corpus(tmp_path / "code", [[20] * 100] * 10),
    }


def test_phases_switch_at_their_tokens(corpora: dict[str, Path], make_config: MakeConfig) -> None:
    phases = [
        {"blend": {"web": 1}},
        {"start": "60%", "blend": {"code": 1}},
        {"start": "80%", "blend": {"web": 1}},
        {"start": "-160", "blend": {"code": 1}},
    ]
    config = make_config({"sources": corpora, "phases": phases})
    assert config.total_tokens == 6400
    stream = build_train_stream(config)
    assert [phase.start_sample for phase in stream.blend.phases] == [0, 240, 320, 390]
    drawn = [int(stream[index]["tokens"][0]) for index in range(400)]
    assert drawn == [10] * 240 + [20] * 80 + [10] * 70 + [20] * 10


def test_phase_inside_a_sample_begins_with_the_next(corpora: dict[str, Path], make_config: MakeConfig) -> None:
    stream = build_train_stream(make_config({"sources": corpora, "phases": [{}, {"start": 1601}]}))
    assert stream.blend.phases[1].start_sample == 101


def test_empty_blend_goes_by_size(corpora: dict[str, Path], make_config: MakeConfig) -> None:
    stream = build_train_stream(make_config({"sources": corpora}))
    assert [use.share for use in stream.usage(0, 4096)] == [0.75, 0.25]


def test_blend_report_warns_of_repetition(corpora: dict[str, Path], make_config: MakeConfig) -> None:
    phases = [{"blend": {"web": 3, "code": 1}}, {"start": "50%", "blend": {"code": 1}}]
    stream = build_train_stream(make_config({"sources": corpora, "phases": phases}))
    report = describe_blend(stream, 400)
    assert "warning: code is repeated" not in report and "phase 1" in report and "100.00%" in report
    assert "warning: code is repeated" in describe_blend(stream, 4000) and "run      web" in describe_blend(stream, 4000)


def test_validation_streams_by_source(corpora: dict[str, Path], make_config: MakeConfig) -> None:
    streams = build_validation_streams(make_config({"sources": corpora}, validation=corpora))
    assert {name: int(stream[0]["tokens"][0]) for name, stream in streams.items()} == {"web": 10, "code": 20}
    assert build_validation_streams(make_config({"sources": corpora})) == {}


@pytest.mark.parametrize("validation", [False, True])
def test_bad_corpora_are_refused(
    corpora: dict[str, Path], make_config: MakeConfig, write_corpus: WriteCorpus, tmp_path: Path, validation: bool
) -> None:
    def refuse(prefix: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            if validation:
                build_validation_streams(make_config({"sources": corpora}, validation={"bad": prefix}))
            else:
                build_train_stream(make_config({"sources": {**corpora, "bad": prefix}}))

    refuse(tmp_path / "nowhere", r"nowhere\.idx does not exist")
    truncated = write_corpus(tmp_path / "truncated", [[1] * 100])
    bin_path(truncated).write_bytes(bin_path(truncated).read_bytes()[:-2])
    refuse(truncated, r"truncated\.bin holds 198 bytes")
    idx_path(truncated).write_bytes(b"")
    refuse(truncated, r"truncated\.idx is truncated")
    refuse(write_corpus(tmp_path / "short", [[1] * 16]), r"short\) has 16 tokens, but one sample takes sequence_length \+ 1 = 17")
    refuse(write_corpus(tmp_path / "empty", []), r"empty\) has 0 tokens")
    refuse(write_corpus(tmp_path / "large", [[1] * 99 + [1000]], 2000), r"holds token id 1000 but model\.vocab_size=1000")


def test_scan_is_kept_until_the_corpus_changes(make_config: MakeConfig, write_corpus: WriteCorpus, tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[7] * 100])
    build_train_stream(make_config({"sources": {"c": prefix}}))
    assert json.loads((tmp_path / "c.scan.json").read_text())["max_token_id"] == 7
    write_corpus(prefix, [[1000] * 100], 2000)
    with pytest.raises(ValueError, match="holds token id 1000"):
        build_train_stream(make_config({"sources": {"c": prefix}}))


def test_prepared_corpus_and_its_tokenizer(
    tmp_path: Path,
    make_config: MakeConfig,
    code_files: list[Path],
    tokenizer: SentencePieceTokenizer,
    model_proto: bytes,
    huggingface_definition: str,
) -> None:
    model, other = tmp_path / "t.model", tmp_path / "tokenizer.json"
    model.write_bytes(model_proto)
    other.write_text(huggingface_definition, "utf-8")
    prepare_corpus(code_files[:5], tokenizer, tmp_path / "c", show_progress=False)
    data = {"sources": {"c": tmp_path / "c"}, "tokenizer": {"path": model}}
    stream = build_train_stream(make_config(data))
    assert not (tmp_path / "c.scan.json").exists()
    assert stream[0]["tokens"].max() < 800
    with pytest.raises(ValueError, match=r"t\.model has 800 tokens but model\.vocab_size=700; raise model\.vocab_size to at least 800"):
        build_train_stream(make_config(data, vocab_size=700))
    with pytest.raises(ValueError, match="made by another tokenizer than data.tokenizer"):
        build_train_stream(make_config({**data, "tokenizer": {"kind": "huggingface", "path": other}}))
    with pytest.raises(ValueError, match=r"tokenizer .*missing\.model does not exist"):
        build_train_stream(make_config({**data, "tokenizer": {"path": tmp_path / "missing.model"}}))
    report = tmp_path / "c.json"
    report.write_text(report.read_text().replace('"tokens": ', '"tokens": 1'))
    with pytest.raises(ValueError, match=r"c\.json reports 1\d+ tokens but"):
        build_train_stream(make_config(data))
    report.write_text("{}")
    with pytest.raises(ValueError, match=r"c\.json is no report"):
        build_train_stream(make_config(data))
