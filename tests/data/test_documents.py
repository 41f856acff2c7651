"""Reading documents: every document once however files are cut, bad ones counted by reason."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_hybrid.data.documents import Document, ReadOptions, Skipped, find_inputs, plan_parts, read_documents
from megatron_hybrid.data.indexed import CorpusError


def read_all(
    inputs: list[Path | str], part_size_bytes: int = 1 << 20, pattern: str = "*", options: ReadOptions = ReadOptions()
) -> list[Document | Skipped]:
    parts = plan_parts(find_inputs(inputs, pattern), part_size_bytes)
    return [item for part in parts for piece in part for item in read_documents(piece, options)]


def texts(items: list[Document | Skipped]) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("last_newline", [True, False])
def test_every_line_once_wherever_the_file_is_cut(tmp_path: Path, newline: str, last_newline: bool) -> None:
    wanted = [f"document {number} \u00e9\u6f22" * (number % 5 + 1) for number in range(20)]
    content = newline.join(json.dumps({"text": text}, ensure_ascii=False) for text in wanted) + newline * last_newline
    path = tmp_path / "c.jsonl"
    path.write_bytes(content.encode())
    for part_size in [1, 2, 3, 7, 50, 51, 52, 53, 54, 55, 1000, 1 << 20]:
        assert texts(read_all([path], part_size)) == wanted


def test_forms_of_input(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfline one\r\nline two\n")
    (tmp_path / "b" / "deep" / "c.py").write_text("code\n")
    (tmp_path / "b" / "d.txt").write_text("not code")
    (tmp_path / "e.jsonl").write_text('\ufeff{"text": "json"}\n')
    with gzip.open(tmp_path / "f.jsonl.gz", "wt") as stream:
        stream.write('{"text": "zipped 1"}\n{"text": "zipped 2"}\n')
    with gzip.open(tmp_path / "g.txt.gz", "wt") as stream:
        stream.write("zipped text")
    assert texts(read_all([tmp_path / "a.txt"])) == ["line one\r\nline two\n"]
    assert texts(read_all([tmp_path / "b"])) == ["not code", "code\n"]
    assert texts(read_all([tmp_path / "b"], pattern="*.py")) == ["code\n"]
    assert texts(read_all([tmp_path / "e.jsonl", tmp_path / "f.jsonl.gz"], part_size_bytes=5)) == ["json", "zipped 1", "zipped 2"]
    assert texts(read_all([str(tmp_path / "*.gz"), str(tmp_path / "**/*.py")])) == ["zipped 1", "zipped 2", "zipped text", "code\n"]
    assert len(find_inputs([tmp_path, tmp_path / "a.txt", str(tmp_path / "*.txt")])) == 6


def test_bad_documents_are_told_apart(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b"{",
        b"[1]",
        b'{"body": "x"}',
        b'{"text": 5}',
        b'{"text": ""}',
        b'{"text": " \\n"}',
        b"",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
    ]
    lines += [b'{"text": "' + b"y" * 100 + b'"}', b'{"text": "' + b"z" * 10_000 + b'"}', b"[" * 100_000, b'{"text": "also good"}']
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("\u00e9".encode("latin-1"))
    (tmp_path / "long.txt").write_bytes(b"x" * 51)
    items = read_all([tmp_path], options=ReadOptions(max_document_bytes=50))
    assert texts(items) == ["good", "also good"]
    skipped = [item for item in items if isinstance(item, Skipped)]
    assert Counter(item.reason for item in skipped) == {
        "invalid JSON": 1,
        "not a JSON object": 1,
        "no field 'text'": 1,
        "field 'text' is no string": 1,
        "empty": 3,
        "blank line": 1,
        "not UTF-8": 2,
        "unpaired surrogate": 1,
        "too long": 4,
    }
    assert next(item.location for item in skipped if item.reason == "invalid JSON") == f"{tmp_path}/c.jsonl, line 2"


def test_named_field(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"body": "x", "text": "y"}\n')
    assert texts(read_all([tmp_path / "c.jsonl"], options=ReadOptions(field="body"))) == ["x"]


def test_unusable_inputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for given, message in [("nowhere.txt", "does not exist"), ("folder", "holds no file"), ("*.txt", "matches no file")]:
        with pytest.raises(CorpusError, match=message):
            find_inputs([tmp_path / given])
    damaged = tmp_path / "c.jsonl.gz"
    damaged.write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-10])
    with pytest.raises(CorpusError, match=r"c\.jsonl\.gz is a damaged or truncated gzip file"):
        read_all([damaged])
    changing = tmp_path / "d.txt"
    changing.write_text("before")
    parts = plan_parts(find_inputs([changing]), 1000)
    changing.write_text("and after")
    with pytest.raises(CorpusError, match="changed from 6 to 9 bytes"):
        list(read_documents(parts[0][0], ReadOptions()))
