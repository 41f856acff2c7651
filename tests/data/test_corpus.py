"""Tokenise and index: the same bytes for any number of workers and any interruption; nothing mixed, nothing lost."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_hybrid.data.corpus import holdout_prefix, prepare_corpus
from megatron_hybrid.data.documents import ReadOptions, find_inputs, plan_parts
from megatron_hybrid.data.indexed import CorpusError, IndexedCorpus
from megatron_hybrid.data.parts import PartBuilder
from megatron_hybrid.data.report import load_report
from megatron_hybrid.data.tokenizer import SentencePieceTokenizer

PART_SIZE = 30_000


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, code_files: list[Path]) -> list[Path]:
    """A folder of text files and a JSON lines file with bad lines in it."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "code").mkdir()
    for path in code_files[:40]:
        (folder / "code" / f"{path.parent.name}.{path.name}").write_bytes(path.read_bytes())
    lines = [json.dumps({"text": f"document {number} " * (number % 40 + 1)}) for number in range(500)]
    lines[100:100] = ["{broken", "", '{"other": 1}']
    (folder / "lines.jsonl").write_text("\n".join(lines))
    return [folder / "code", folder / "lines.jsonl"]


def contents(prefix: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(prefix.parent.iterdir())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, inputs: list[Path], tokenizer: SentencePieceTokenizer) -> dict[str, bytes]:
    """The files of an uninterrupted run in one process."""
    prefix = tmp_path_factory.mktemp("finished") / "c"
    prepare_corpus(inputs, tokenizer, prefix, holdout=0.1, part_size_bytes=PART_SIZE, show_progress=False)
    return contents(prefix)


def test_holds_every_document_in_order_with_its_end(tmp_path: Path, inputs: list[Path], tokenizer: SentencePieceTokenizer) -> None:
    prefix = tmp_path / "new" / "c"
    prepared = prepare_corpus(inputs, tokenizer, prefix, part_size_bytes=PART_SIZE, show_progress=False)
    wanted = [path.read_text("utf-8") for path in sorted(inputs[0].iterdir()) if path.read_text("utf-8").strip()]
    wanted += [f"document {number} " * (number % 40 + 1) for number in range(500)]
    corpus = IndexedCorpus(prefix)
    assert corpus.num_documents == len(wanted) == prepared.report.documents
    for number, text in enumerate(wanted):
        ids = corpus.read(number).tolist()
        assert ids[-1] == tokenizer.eod_id and tokenizer.eod_id not in ids[:-1]
        assert tokenizer.decode(ids[:-1]) == text
    report = load_report(prefix)
    assert report == prepared.report and report is not None
    assert (
        report.tokens == corpus.num_tokens and report.max_token_id == int(corpus.tokens.max()) < report.vocab_size == tokenizer.vocab_size
    )
    bad_lines = {"invalid JSON": 1, "blank line": 1, "no field 'text'": 1}
    assert {reason: count for reason, count in report.skipped.items() if reason != "empty"} == bad_lines
    assert "lines.jsonl" in report.examples["invalid JSON"][0]
    assert sorted(contents(prefix)) == ["c.bin", "c.idx", "c.json"]


def test_workers_change_nothing(tmp_path: Path, inputs: list[Path], tokenizer: SentencePieceTokenizer, finished: dict[str, bytes]) -> None:
    prepare_corpus(inputs, tokenizer, tmp_path / "c", holdout=0.1, num_workers=3, part_size_bytes=PART_SIZE, show_progress=False)
    assert contents(tmp_path / "c") == finished


def test_parts_change_no_tokens(tmp_path: Path, inputs: list[Path], tokenizer: SentencePieceTokenizer, finished: dict[str, bytes]) -> None:
    prepare_corpus(inputs, tokenizer, tmp_path / "c", holdout=0.1, part_size_bytes=777, show_progress=False)
    found = contents(tmp_path / "c")
    assert all(found[name] == finished[name] for name in finished if not name.endswith(".json"))


def test_interrupted_anywhere_it_continues_to_the_same_bytes(
    tmp_path: Path, inputs: list[Path], tokenizer: SentencePieceTokenizer, finished: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    build = PartBuilder.build

    def stop_at_every_third(builder: PartBuilder, number: int, slices: tuple[object, ...]) -> None:
        if len(built) % 3 == 2:
            built.append(-1)
            raise KeyboardInterrupt
        build(builder, number, slices)
        built.append(number)

    monkeypatch.setattr(PartBuilder, "build", stop_at_every_third)
    for _ in itertools.count():
        try:
            prepare_corpus(inputs, tokenizer, tmp_path / "c", holdout=0.1, part_size_bytes=PART_SIZE, show_progress=False)
            break
        except KeyboardInterrupt:
            assert (tmp_path / "c.parts").is_dir() and not (tmp_path / "c.idx").exists()
    num_parts = len(plan_parts(find_inputs(inputs), PART_SIZE))
    assert [number for number in built if number >= 0] == list(range(num_parts)), "each part is built exactly once"
    assert contents(tmp_path / "c") == finished


def test_damaged_or_uncommitted_part_is_built_again(
    tmp_path: Path, inputs: list[Path], tokenizer: SentencePieceTokenizer, finished: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("megatron_hybrid.data.corpus._assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(inputs, tokenizer, tmp_path / "c", holdout=0.1, part_size_bytes=PART_SIZE, show_progress=False)
    part = tmp_path / "c.parts" / "000001.main.bin"
    part.write_bytes(part.read_bytes()[:-10])
    (tmp_path / "c.parts" / "000002.json").unlink()
    prepare_corpus(inputs, tokenizer, tmp_path / "c", holdout=0.1, part_size_bytes=PART_SIZE, show_progress=False)
    assert contents(tmp_path / "c") == finished


def test_killed_run_leaves_no_process_and_continues(
    tmp_path: Path, code_files: list[Path], tokenizer: SentencePieceTokenizer, model_proto: bytes
) -> None:
    big = tmp_path / "big.jsonl"
    line = json.dumps({"text": "".join(path.read_text("utf-8") for path in code_files[:30])}) + "\n"
    big.write_text(line * 60)
    (tmp_path / "t.model").write_bytes(model_proto)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "tools.preprocess_data", "--input", str(big), "--tokenizer", str(tmp_path / "t.model")]
    process = subprocess.Popen([*command, "--output", str(tmp_path / "out" / "c"), "--workers", "2"], stderr=subprocess.DEVNULL)
    parts = tmp_path / "out" / "c.parts"
    while not list(parts.glob("*[0-9].json")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "workers end when their parent does"
    assert not (tmp_path / "out" / "c.idx").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in parts.glob("*[0-9].json")}
    assert finished
    subprocess.run([*command, "--output", str(tmp_path / "out" / "c"), "--workers", "2"], check=True, capture_output=True)
    prepare_corpus([big], tokenizer, tmp_path / "whole" / "c", show_progress=False)
    assert contents(tmp_path / "out" / "c") == contents(tmp_path / "whole" / "c")


def test_a_second_run_reuses_what_is_there(tmp_path: Path, inputs: list[Path], tokenizer: SentencePieceTokenizer) -> None:
    first = prepare_corpus(inputs, tokenizer, tmp_path / "c", holdout=0.1, show_progress=False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = prepare_corpus(inputs, tokenizer, tmp_path / "c", holdout=0.1, show_progress=False)
    assert (first.reused, second.reused) == (False, True) and (second.report, second.holdout) == (first.report, first.holdout)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    (tmp_path / "c.holdout.bin").unlink()
    assert not prepare_corpus(inputs, tokenizer, tmp_path / "c", holdout=0.1, overwrite=True, show_progress=False).reused


def test_other_inputs_or_options_are_never_mixed_in(
    tmp_path: Path,
    inputs: list[Path],
    tokenizer: SentencePieceTokenizer,
    huggingface_tokenizer: SentencePieceTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefix = tmp_path / "c"
    with monkeypatch.context() as patch:
        patch.setattr("megatron_hybrid.data.corpus._assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(inputs, tokenizer, prefix, show_progress=False)
    with pytest.raises(CorpusError, match=r"c\.parts holds parts made with other settings \(tokenizer: "):
        prepare_corpus(inputs, huggingface_tokenizer, prefix, show_progress=False)
    prepare_corpus(inputs, tokenizer, prefix, show_progress=False)
    before = contents(prefix)
    with pytest.raises(CorpusError, match=r"made with other settings \(field: text there, body now"):
        prepare_corpus(inputs, tokenizer, prefix, options=ReadOptions(field="body"), show_progress=False)
    with pytest.raises(CorpusError, match=r"made with other settings \(inputs: .*input_files: 41 there, 1 now"):
        prepare_corpus(inputs[1:], tokenizer, prefix, show_progress=False)
    assert contents(prefix) == before
    replaced = prepare_corpus(inputs[1:], tokenizer, prefix, overwrite=True, show_progress=False)
    assert replaced.report.documents == IndexedCorpus(prefix).num_documents == 500


def test_a_run_beside_another_is_refused(
    tmp_path: Path, inputs: list[Path], tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second_run(builder: PartBuilder, number: int, slices: tuple[object, ...]) -> None:
        with pytest.raises(CorpusError, match=r"c\.parts is in use by another run"):
            prepare_corpus(inputs, tokenizer, tmp_path / "c", show_progress=False)
        raise KeyboardInterrupt

    monkeypatch.setattr(PartBuilder, "build", second_run)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(inputs, tokenizer, tmp_path / "c", show_progress=False)


def test_holdout_takes_its_share_by_content(tmp_path: Path, inputs: list[Path], tokenizer: SentencePieceTokenizer) -> None:
    whole = prepare_corpus(inputs, tokenizer, tmp_path / "whole", show_progress=False)
    split = prepare_corpus(inputs, tokenizer, tmp_path / "split", holdout=0.2, show_progress=False)
    assert split.holdout is not None
    assert split.report.documents + split.holdout.documents == whole.report.documents
    assert split.report.tokens + split.holdout.tokens == whole.report.tokens
    assert 0.1 < split.holdout.documents / whole.report.documents < 0.3
    main, held_out = (IndexedCorpus(prefix) for prefix in (tmp_path / "split", holdout_prefix(tmp_path / "split")))
    in_main, in_holdout = ({corpus.read(number).tobytes() for number in range(corpus.num_documents)} for corpus in (main, held_out))
    assert not in_main & in_holdout
    with pytest.raises(CorpusError, match="holdout of 1e-09 chose no document"):
        prepare_corpus(inputs, tokenizer, tmp_path / "none", holdout=1e-9, show_progress=False)


def test_nothing_usable_is_an_error_with_the_reasons(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    (tmp_path / "c.jsonl").write_text("{\n{\n\n")
    with pytest.raises(CorpusError, match="no document left .*skipped 2 invalid JSON, 1 blank line"):
        prepare_corpus([tmp_path / "c.jsonl"], tokenizer, tmp_path / "out" / "c", show_progress=False)
    for options, message in [({"holdout": 1.0}, "holdout is the share"), ({"num_workers": 0}, "workers must be 1 or more")]:
        with pytest.raises(CorpusError, match=message):
            prepare_corpus([tmp_path / "c.jsonl"], tokenizer, tmp_path / "out" / "c", show_progress=False, **options)


def test_refusals_leave_no_folder(tmp_path: Path, inputs: list[Path], tokenizer: SentencePieceTokenizer) -> None:
    prepare_corpus(inputs, tokenizer, tmp_path / "c", show_progress=False)
    before = contents(tmp_path / "c")
    with pytest.raises(CorpusError):
        prepare_corpus(inputs[1:], tokenizer, tmp_path / "c", show_progress=False)
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize("num_workers", [1, 2])
def test_full_disk_keeps_finished_parts(
    tmp_path: Path, inputs: list[Path], model_proto: bytes, finished: dict[str, bytes], tokenizer: SentencePieceTokenizer, num_workers: int
) -> None:
    # In a process of its own, whose limit on file sizes its workers inherit: parts fit, the whole corpus does not.
    script = f"""
import resource, sys
from pathlib import Path
from megatron_hybrid.data.corpus import prepare_corpus
from megatron_hybrid.data.tokenizer import SentencePieceTokenizer
if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    try:
        tokenizer = SentencePieceTokenizer(Path({str(tmp_path / "t.model")!r}).read_bytes())
        prepare_corpus({[str(path) for path in inputs]}, tokenizer, Path({str(tmp_path / "out" / "c")!r}), holdout=0.1,
                       part_size_bytes={PART_SIZE}, num_workers={num_workers}, show_progress=False)
    except OSError as error:
        print(error.errno, error)
"""
    (tmp_path / "t.model").write_bytes(model_proto)
    (tmp_path / "run.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    result = subprocess.run([sys.executable, str(tmp_path / "run.py")], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.startswith(f"{errno.EFBIG} ") and "run the same command again" in result.stdout, result.stderr
    assert not (tmp_path / "out" / "c.idx").exists() and list((tmp_path / "out" / "c.parts").glob("*.json"))
    prepare_corpus(inputs, tokenizer, tmp_path / "out" / "c", holdout=0.1, part_size_bytes=PART_SIZE, show_progress=False)
    assert contents(tmp_path / "out" / "c") == finished


def test_dead_worker_is_one_clear_error(tmp_path: Path, inputs: list[Path], tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(CorpusError, match=r"a worker process died \(exit code 9;.*finished parts are kept"):
        prepare_corpus(inputs, _DyingTokenizer(tokenizer), tmp_path / "c", num_workers=2, part_size_bytes=PART_SIZE, show_progress=False)


def test_worker_errors_come_through(tmp_path: Path, inputs: list[Path], tokenizer: SentencePieceTokenizer) -> None:
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(CorpusError, match=r"bad\.jsonl\.gz is a damaged"):
        prepare_corpus(
            [*inputs, tmp_path / "bad.jsonl.gz"], tokenizer, tmp_path / "c", num_workers=2, part_size_bytes=PART_SIZE, show_progress=False
        )


class _DyingTokenizer:
    """Takes its process down with it, as the system does when memory runs out."""

    def __init__(self, real: SentencePieceTokenizer) -> None:
        self.vocab_size, self.eod_id, self.fingerprint = real.vocab_size, real.eod_id, "dying"

    def encode_batch(self, texts: list[str]) -> list[object]:
        os._exit(9)
