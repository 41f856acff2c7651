"""The command lines: train a tokenizer, prepare a corpus, say what happened, fail with one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hybrid.data.indexed import IndexedCorpus
from megatron_hybrid.data.tokenizer import load_tokenizer
from tools import preprocess_data, train_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer made by the command line from Python sources."""
    path = tmp_path_factory.mktemp("tokenizer") / "new" / "t.model"
    code = ["--input", str(Path(json.__file__).parent), "--glob", "*.py", "--vocab-size", "500", "--output", str(path)]
    assert train_tokenizer.main(code) == 0
    return path


def test_text_to_corpus(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for number in range(100):
        (tmp_path / "in" / f"{number}.txt").write_text(f"text number {number}\n" * 10)
    (tmp_path / "in" / "empty.txt").write_text("")
    command = [
        "--input",
        str(tmp_path / "in"),
        "--tokenizer",
        str(model),
        "--output",
        str(tmp_path / "c"),
        "--holdout",
        "0.2",
        "--workers",
        "2",
    ]
    assert preprocess_data.main(command) == 0
    said = capsys.readouterr().out
    main, held_out = IndexedCorpus(tmp_path / "c"), IndexedCorpus(tmp_path / "c.holdout")
    assert main.num_documents + held_out.num_documents == 100
    assert f"{tmp_path}/c: {main.num_documents} documents, {main.num_tokens:,} tokens" in said
    assert f"c.holdout: {held_out.num_documents} documents" in said and "skipped 1: empty (such as" in said
    assert load_tokenizer("sentencepiece", model).decode(main.read(0).tolist()).startswith("text number ")
    assert preprocess_data.main(command) == 0
    assert "complete already, from the same inputs and options; reused" in capsys.readouterr().out


def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("some text")
    good = {"--input": str(tmp_path / "a.txt"), "--tokenizer": str(model), "--output": str(tmp_path / "c")}
    for change, message in [
        ({"--input": "nowhere"}, "input nowhere does not exist"),
        ({"--tokenizer": "nowhere"}, "tokenizer nowhere does not exist"),
        ({"--eod-token": "<nope>"}, "none of its tokens is <nope>"),
        ({"--holdout": "2"}, "holdout is the share of documents"),
        ({"--output": "/proc/c"}, "/proc/c"),
    ]:
        assert preprocess_data.main([word for pair in {**good, **change}.items() for word in pair]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error
    assert train_tokenizer.main(["--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "t.model"), "--vocab-size", "9999"]) == 2
    assert "give more text or another vocabulary size" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


@pytest.mark.parametrize("tool", ["preprocess_data", "train_tokenizer"])
def test_help_shows_an_example(tool: str) -> None:
    result = subprocess.run([sys.executable, "-m", f"tools.{tool}", "--help"], capture_output=True, text=True, check=True)
    assert f"python -m tools.{tool} --input" in result.stdout


def test_preparing_data_imports_no_torch() -> None:
    check = "import sys, tools.preprocess_data, tools.train_tokenizer; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
