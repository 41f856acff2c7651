"""Prompts begin as training saw documents begin; pieces of text are whole characters that add up to the text, and end where it stops."""

from __future__ import annotations

import pytest
import tokenizers

from megatron_hybrid.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_hybrid.data.tokenizer_training import train_sentencepiece
from megatron_hybrid.generate.text import TextStream, encode_prompt

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


def pieces(tokenizer: Tokenizer, prompt: list[int], continuation: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """What each token of the continuation adds to the text, and then what is left."""
    stream = TextStream(tokenizer, prompt, stop)
    return [*(stream.feed(token) for token in continuation), stream.flush()]


def test_a_prompt_begins_with_what_comes_before_a_document(byte_tokenizer: Tokenizer) -> None:
    tokens = byte_tokenizer.encode(TEXT)
    assert encode_prompt(TEXT, byte_tokenizer) == tokens
    assert encode_prompt(TEXT, byte_tokenizer, (byte_tokenizer.eod_id,)) == [byte_tokenizer.eod_id, *tokens]


@pytest.mark.parametrize(("prompt", "message"), [("", "has no tokens"), ("a\udc80", "surrogates not allowed at character 1")])
def test_a_prompt_that_is_no_text_is_refused(prompt: str, message: str, byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        encode_prompt(prompt, byte_tokenizer, (byte_tokenizer.eod_id,))


def test_no_piece_splits_a_character(byte_tokenizer: Tokenizer) -> None:
    continuation = byte_tokenizer.encode(TEXT)
    streamed = pieces(byte_tokenizer, byte_tokenizer.encode("words"), continuation)
    assert "".join(streamed) == TEXT
    assert "" in streamed and not any("\ufffd" in piece for piece in streamed)
    assert len(continuation) > len(TEXT.split()), "some characters take several tokens"


def test_an_unfinished_character_shows_at_the_end(byte_tokenizer: Tokenizer) -> None:
    emoji = byte_tokenizer.encode("\U0001f600")
    ended = pieces(byte_tokenizer, byte_tokenizer.encode("a"), emoji[:-1])
    assert set("".join(ended[:-1]).strip()) == set() and "\ufffd" in ended[-1]


def test_the_first_new_token_keeps_its_space(space_dropping_tokenizer: Tokenizer) -> None:
    prompt = space_dropping_tokenizer.encode("three")
    assert pieces(space_dropping_tokenizer, prompt, [2, 3]) == [" words", " more", ""]


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        (("words",), "three "),
        (("nothing",), TEXT),
        (("!",), TEXT[:-1]),
        (("ords, \u00e9", "three words, \u00e9t\u00e9"), "three w"),
        (("wo", "ee"), "thr"),
        (("\U0001f600!?",), TEXT),
    ],
)
def test_a_text_ends_before_its_first_stop_string(stop: tuple[str, ...], shown: str, byte_tokenizer: Tokenizer) -> None:
    prompt, whole = byte_tokenizer.encode("more"), byte_tokenizer.encode(TEXT)
    stream, text = TextStream(byte_tokenizer, prompt, stop), ""
    for token in whole:
        text += stream.feed(token)
        assert shown.startswith(text), "nothing is shown that a stop string takes back"
        if stream.is_stopped:
            break
    text += stream.flush()
    assert text == shown and stream.is_stopped == any(each in TEXT for each in stop)
