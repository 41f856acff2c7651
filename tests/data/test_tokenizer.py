"""Tokenizers: exact round trips, no control tokens from text, the same ids by every path."""

from __future__ import annotations

import pickle
import random
import sys
from pathlib import Path

import pytest
import sentencepiece

from megatron_hybrid.data.tokenizer import (
    Detokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer_kind,
)
from megatron_hybrid.data.tokenizer_training import train_sentencepiece
from megatron_hybrid.data.word_cuts import word_pattern

HARD_TEXTS = [
    "",
    " ",
    "\n\n\n",
    "  leading, trailing  \n",
    "\tif x:\r\n\t\treturn 12345  # tabs\r\n",
    "na\u00efve \U0001f600\U0001f1e9\U0001f1ea e\u0301 \u6f22\u5b57\u304b\u306a",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u05e2\u05d1\u05e8\u05d9\u05ea",
    "<|eod|></s><unk><0x0A><|endoftext|>",
    "nul \x00 bell \x07 zwj a\u200db bom \ufeff replacement \ufffd",
    "\ufb01 ligature, \uff21 full width, \u00a0 no-break space",
    "x" * 5000 + " " * 500 + "0" * 300,
]


def random_texts(count: int) -> list[str]:
    """Texts from an alphabet that brings every pair of character classes together."""
    draw = random.Random(0)
    alphabet = "  \n\n\t\rabcdefXYZ0189.,:;()[]{}'\"#_-=+*/<>|\\~^`@!?$%&\u00e9\u0436\u6f22\U0001f600\u200d\x00\x7f\x0b"
    return ["".join(draw.choices(alphabet, k=draw.randrange(1, 400))) for _ in range(count)]


@pytest.fixture(params=["sentencepiece", "huggingface"])
def any_tokenizer(
    request: pytest.FixtureRequest, tokenizer: SentencePieceTokenizer, huggingface_tokenizer: HuggingFaceTokenizer
) -> Tokenizer:
    return tokenizer if request.param == "sentencepiece" else huggingface_tokenizer


def test_round_trip_of_source_files(any_tokenizer: Tokenizer, code_files: list[Path]) -> None:
    for path in code_files:
        text = path.read_text("utf-8")
        assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_round_trip_of_hard_texts(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert any_tokenizer.eod_id not in ids
    assert all(0 <= token < any_tokenizer.vocab_size for token in ids)


def test_batches_give_the_same_ids_as_single_texts(any_tokenizer: Tokenizer, code_files: list[Path]) -> None:
    texts = [*HARD_TEXTS, *random_texts(300), *(path.read_text("utf-8") for path in code_files)]
    for _ in range(2):
        for text, ids in zip(texts, any_tokenizer.encode_batch(texts), strict=True):
            assert ids.tolist() == any_tokenizer.encode(text)


def test_end_of_document_decodes_to_nothing(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.decode([any_tokenizer.eod_id]) == ""


def test_pickled_tokenizer_is_the_same(any_tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(any_tokenizer))
    assert copy.fingerprint == any_tokenizer.fingerprint and copy.encode("def f():") == any_tokenizer.encode("def f():")


@pytest.mark.parametrize("text", [text for text in HARD_TEXTS if text])
def test_streaming_gives_the_same_text(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text)[:200]
    detokenizer = Detokenizer(any_tokenizer)
    pieces = [detokenizer.feed(token) for token in ids]
    assert "".join(pieces) + detokenizer.flush() == any_tokenizer.decode(ids)


def test_streaming_holds_back_half_a_character(any_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(any_tokenizer)
    ids = any_tokenizer.encode("\U0001f600")
    assert len(ids) > 1
    pieces = [detokenizer.feed(token) for token in ids]
    assert pieces == [""] * (len(ids) - 1) + ["\U0001f600"]
    detokenizer.feed(ids[0])
    assert detokenizer.flush() == "\ufffd"


def test_training_is_deterministic_and_text_decides(code_files: list[Path], model_proto: bytes) -> None:
    texts = [path.read_text("utf-8") for path in code_files]
    assert train_sentencepiece(iter(texts), 800) == model_proto
    assert train_sentencepiece(iter(texts[:20]), 800) != model_proto


def test_training_says_why_it_cannot() -> None:
    with pytest.raises(ValueError, match="hold no text"):
        train_sentencepiece(["", ""], 400)
    with pytest.raises(ValueError, match="4000 entries.*give more text or another vocabulary size"):
        train_sentencepiece(["too little text"], 4000)


def test_words_cover_any_text(model_proto: bytes) -> None:
    pattern = word_pattern(model_proto)
    assert pattern is not None
    for text in [*HARD_TEXTS, *random_texts(100)]:
        assert "".join(pattern.findall(text)) == text
    assert len(pattern.findall("def f(self): return 10")) > 8


@pytest.mark.parametrize(
    "option",
    [
        {"model_type": "unigram"},
        {"byte_fallback": False},
        {"normalization_rule_name": "nfkc"},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
    ],
)
def test_no_words_where_cutting_would_change_ids(tmp_path: Path, code_files: list[Path], option: dict[str, object]) -> None:
    settings: dict[str, object] = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    prefix = tmp_path / "other"
    texts = (path.read_text("utf-8") for path in code_files[:10])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_prefix=str(prefix), vocab_size=400, minloglevel=2, **{**settings, **option}
    )
    model = prefix.with_suffix(".model").read_bytes()
    assert word_pattern(model) is None
    tokenizer = SentencePieceTokenizer(model)
    assert tokenizer.encode_batch(["def  f():\n"])[0].tolist() == tokenizer.encode("def  f():\n")


def test_loading_from_disk(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, model_proto: bytes, huggingface_tokenizer: Tokenizer, huggingface_definition: str
) -> None:
    model, folder = tmp_path / "t.model", tmp_path / "folder"
    model.write_bytes(model_proto)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(huggingface_definition, "utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}')
    assert [tokenizer_kind(path) for path in (model, folder)] == ["sentencepiece", "huggingface"]
    assert load_tokenizer("sentencepiece", model).fingerprint == tokenizer.fingerprint
    assert load_tokenizer("huggingface", folder / "tokenizer.json").encode("def f():") == huggingface_tokenizer.encode("def f():")
    through_transformers = load_tokenizer("huggingface", folder)
    assert through_transformers.encode("def f():") == huggingface_tokenizer.encode("def f():")
    assert through_transformers.eod_id == huggingface_tokenizer.eod_id


def test_named_end_of_document_token(huggingface_definition: str) -> None:
    assert HuggingFaceTokenizer(huggingface_definition, "def").eod_id != HuggingFaceTokenizer(huggingface_definition).eod_id
    with pytest.raises(ValueError, match="none of its tokens is <nope>"):
        HuggingFaceTokenizer(huggingface_definition, "<nope>")


def test_unusable_tokenizers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    junk = tmp_path / "junk.model"
    junk.write_bytes(b"junk")
    for kind in ("sentencepiece", "huggingface"):
        with pytest.raises(ValueError, match=r"tokenizer .*junk\.model: no "):
            load_tokenizer(kind, junk)
        with pytest.raises(ValueError, match=r"tokenizer .*nowhere does not exist"):
            load_tokenizer(kind, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a folder"):
        load_tokenizer("sentencepiece", tmp_path)
    binary = tmp_path / "binary.model"
    binary.write_bytes(b"\n\xff\xfe")
    with pytest.raises(ValueError, match=r"binary\.model: .* is no text; for a sentencepiece \.model set kind to sentencepiece"):
        load_tokenizer("huggingface", binary)
    with pytest.raises(ValueError, match="transformers cannot read this folder"):
        load_tokenizer("huggingface", tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="needs transformers, which is not installed"):
        load_tokenizer("huggingface", tmp_path)
