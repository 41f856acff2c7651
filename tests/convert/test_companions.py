"""What goes with the weights: which files belong to a tokenizer, what of them a verdict misses, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hybrid.config import TokenizerConfig
from megatron_hybrid.convert.companions import Companions, companion_differences, copy_tokenizer, files_of, read_token_ids


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(name)
    return folder


def test_files_of_a_tokenizer_are_those_beside_it_and_no_other_tokenizer(tmp_path: Path) -> None:
    beside = touch(tmp_path, "tokenizer.json", "tokenizer.model", "mine.model", "mine.json", "chat_template.jinja", "model.safetensors")
    for kind, name, expected in (
        ("huggingface", "tokenizer.json", {"tokenizer.json", "tokenizer.model", "chat_template.jinja"}),
        ("huggingface", "mine.json", {"tokenizer.json", "chat_template.jinja"}),
        ("sentencepiece", "mine.model", {"tokenizer.model", "chat_template.jinja"}),
        ("huggingface", ".", {"tokenizer.json", "tokenizer.model", "mine.model", "chat_template.jinja"}),
    ):
        tokenizer = TokenizerConfig(kind=kind, path=beside / name)
        files = files_of(tokenizer)
        assert files.keys() == expected
        copied = copy_tokenizer(Companions(files, tokenizer), tmp_path / "copy", tmp_path / "copy")
        assert copied.path.exists() and (name == "." or copied.path.read_bytes() == (beside / name).read_bytes())


def test_a_verdict_names_what_is_lost(tmp_path: Path) -> None:
    here, there = touch(tmp_path / "here", "tokenizer.json", "vocab.json"), touch(tmp_path / "there", "tokenizer.json")
    source = Companions({name: here / name for name in ("tokenizer.json", "vocab.json")}, token_ids={"eos_token_id": [2, 11]})
    target = Companions({"tokenizer.json": there / "tokenizer.json"}, token_ids={"bos_token_id": 1, "eos_token_id": 2})
    assert companion_differences(source, target) == [
        "vocab.json: not there, though the source has it",
        "eos_token_id: 2, in the source [2, 11]",
    ]
    assert companion_differences(replace(target, token_ids={}), source) == []
    (there / "tokenizer.json").write_text("another")
    assert companion_differences(source, replace(target, token_ids=source.token_ids))[0] == "tokenizer.json: other contents"


@pytest.mark.parametrize("value", ["</s>", True, [2, None], {"id": 2}, 2.0])
def test_special_tokens_that_are_no_ids_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="config.json has eos_token_id=.*; expected a token's id, a list of ids or null"):
        read_token_ids({"eos_token_id": value}, "config.json")
    assert read_token_ids({"eos_token_id": [], "bos_token_id": None}, "config.json") == {"eos_token_id": [], "bos_token_id": None}
