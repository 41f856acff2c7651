"""Prompts begin as training saw documents begin, and pieces of text are whole characters that add up to the text."""

from __future__ import annotations

import pytest
import tokenizers

from megatron_hybrid.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_hybrid.data.tokenizer_training import train_sentencepiece
from megatron_hybrid.generate import text as text_module
from megatron_hybrid.generate.load import LanguageModel
from megatron_hybrid.generate.sampling import Sampling
from megatron_hybrid.generate.text import encode_prompt, stream_text

TEXT = "three words, \u00e9t\u00e9 \u4f60\u597d \U0001f600!"


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """Spells what it did not see in training byte by byte."""
    return SentencePieceTokenizer(train_sentencepiece(["three words and three words more, again and again"] * 20, 290))


@pytest.fixture(scope="module")
def space_dropping_tokenizer() -> Tokenizer:
    """Its decoder drops the space in front of the first token, as Llama's does."""
    vocabulary = {"</s>": 0, "\u2581three": 1, "\u2581words": 2, "\u2581more": 3}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="</s>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    return HuggingFaceTokenizer(model.to_str())


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch):
    """Return a function (tokenizer, prompt, continuation) that streams tokens as if a model had chosen them."""

    def stream(tokenizer: Tokenizer, prompt: list[int], continuation: list[int], max_new_tokens: int = 1000) -> list[str]:
        monkeypatch.setattr(text_module, "generate_tokens", lambda *_, **__: iter(continuation[:max_new_tokens]))
        language_model = LanguageModel(model=None, tokenizer=tokenizer, resets_at_documents=True, checkpoint=None)
        streamed = list(stream_text(language_model, prompt, max_new_tokens=max_new_tokens, sampling=Sampling(), seed=0))
        assert [piece.token for piece in streamed] == continuation[:max_new_tokens]
        return [piece.text for piece in streamed]

    return stream


def test_a_prompt_begins_a_document_as_training_saw_it(byte_tokenizer: Tokenizer) -> None:
    tokens = byte_tokenizer.encode(TEXT)
    assert encode_prompt(TEXT, byte_tokenizer, resets_at_documents=True) == tokens
    assert encode_prompt(TEXT, byte_tokenizer, resets_at_documents=False) == [byte_tokenizer.eod_id, *tokens]


@pytest.mark.parametrize("resets_at_documents", [True, False])
@pytest.mark.parametrize(("prompt", "message"), [("", "has no tokens"), ("a\udc80", "surrogates not allowed at character 1")])
def test_a_prompt_that_is_no_text_is_refused(prompt: str, message: str, resets_at_documents: bool, byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        encode_prompt(prompt, byte_tokenizer, resets_at_documents=resets_at_documents)


def test_no_piece_splits_a_character(byte_tokenizer: Tokenizer, pieces) -> None:
    continuation = byte_tokenizer.encode(TEXT)
    streamed = pieces(byte_tokenizer, byte_tokenizer.encode("words"), [*continuation, byte_tokenizer.eod_id])
    assert "".join(streamed) == TEXT
    assert "" in streamed and not any("\ufffd" in piece for piece in streamed)
    assert len(continuation) > len(TEXT.split()), "some characters take several tokens"


def test_an_unfinished_character_shows_at_the_end(byte_tokenizer: Tokenizer, pieces) -> None:
    emoji = byte_tokenizer.encode("\U0001f600")
    assert "".join(pieces(byte_tokenizer, byte_tokenizer.encode("a"), emoji, max_new_tokens=len(emoji) - 1)).strip("\ufffd") == ""
    ended = pieces(byte_tokenizer, byte_tokenizer.encode("a"), [*emoji[:-1], byte_tokenizer.eod_id])
    assert set(ended[:-1]) == {""} and "\ufffd" in ended[-1]


def test_the_first_new_token_keeps_its_space(space_dropping_tokenizer: Tokenizer, pieces) -> None:
    prompt = space_dropping_tokenizer.encode("three")
    assert pieces(space_dropping_tokenizer, prompt, [2, 3, 0]) == [" words", " more", ""]
