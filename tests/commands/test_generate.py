"""The command from end to end: a run directory in, text out; what training wrote in any layout is read on one rank."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from megatron_hybrid.__main__ import main
from megatron_hybrid.commands.generate import _read_lines, _write_lines
from megatron_hybrid.generate.sampling import Sampling
from megatron_hybrid.generate.scheduler import Event, Request
from megatron_hybrid.generate.session import Session
from tests.generate.models import word_tokenizer
from tests.generate.saved import train
from tests.runs import small_run, write_corpus

LAYOUTS = {"one": {}, "tp2": {"tensor": 2, "sequence_parallel": True}, "pp2": {"pipeline": 2}}
PROMPT = "t5 t17 t3 t200"


def command(*arguments: str) -> tuple[int | str | None, str, str]:
    """Exit code, stdout and stderr of ``generate``, run in a process of its own: it sets threads and determinism."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(["generate", *arguments])
        except SystemExit as exit_:
            code = exit_.code
    out.seek(0)
    return code, out.read(), err.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a tokenizer whose words are t1, t2..."""
    folder = tmp_path_factory.mktemp("generate")
    write_corpus(folder / "text")
    word_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def run_dirs(folder: Path, rank_pool) -> dict[str, Path]:
    """A run in each layout; the first with two checkpoints."""
    for name, layout in LAYOUTS.items():
        run = small_run(
            folder,
            run_dir=folder / name,
            parallel=layout,
            data={"tokenizer": {"kind": "huggingface", "path": folder / "tokenizer.json"}},
            checkpoint={"every_steps": 2 if name == "one" else None},
            train={"steps": 4},
        )
        rank_pool.run(train, run.parallel.model_ranks, run)
    return {name: folder / name for name in LAYOUTS}


@pytest.fixture
def generate(run_ranks):
    """``generate(*arguments)``: exit code, stdout and stderr of the command."""
    return lambda *arguments: run_ranks(command, 1, *map(str, arguments))[0]


def test_every_layout_that_trained_gives_the_same_text(run_dirs: dict[str, Path], generate) -> None:
    for options in (["--temperature", 0], ["--seed", 3, "--top-p", 0.9]):
        texts = set()
        for run_dir in run_dirs.values():
            code, out, err = generate(run_dir, "--prompt", PROMPT, "--max-new-tokens", 12, *options)
            assert code == 0, err
            assert out.startswith(f"{PROMPT} t") and len(out.split()) == 4 + 12, out
            texts.add(out)
        assert len(texts) == 1, texts


def test_a_seed_repeats_and_is_reported_where_none_was_given(run_dirs: dict[str, Path], generate) -> None:
    code, text, err = generate(run_dirs["one"], "--prompt", PROMPT, "--max-new-tokens", 8)
    (seed,) = re.findall(r"seed (\d+)", err)
    assert generate(run_dirs["one"], "--prompt", PROMPT, "--max-new-tokens", 8, "--seed", seed)[1] == text
    assert generate(run_dirs["one"], "--prompt", PROMPT, "--max-new-tokens", 8, "--seed", int(seed) + 1)[1] != text


def test_several_prompts_stand_apart_and_do_not_touch_one_another(run_dirs: dict[str, Path], folder: Path, generate) -> None:
    (folder / "prompt.txt").write_text("t9 t9\n")
    options = ("--max-new-tokens", 6, "--temperature", 0)
    code, out, err = generate(run_dirs["one"], "--prompt", PROMPT, "--prompt-file", folder / "prompt.txt", *options)
    assert code == 0
    alone = [generate(run_dirs["one"], "--prompt", prompt, *options)[1] for prompt in (PROMPT, "t9 t9\n")]
    assert out == f"=== 1 of 2 ===\n{alone[0]}=== 2 of 2 ===\n{alone[1]}"
    assert len(re.findall(r"\d prompt tokens in [\d.]+ s, 6 new ones at [\d.]+ tokens/s; --max-new-tokens reached", err)) == 2


def test_json_lines_come_back_in_order_each_with_its_own_settings(run_dirs: dict[str, Path], folder: Path, generate) -> None:
    lines = [
        {"id": "a", "prompt": PROMPT, "max_new_tokens": 9, "temperature": 0},
        {"id": "b", "prompt": "t9", "max_new_tokens": 2},
        {"id": "c", "prompt": "t9 t9", "seed": 5, "top_k": 3, "repetition_penalty": 1.3},
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    options = ("--max-new-tokens", 4, "--seed", 1, "--batch-size", 2)
    code, out, err = generate(run_dirs["one"], "--input", folder / "prompts.jsonl", "--output", folder / "texts.jsonl", *options)
    assert code == 0 and not out and re.search(r"3 prompts, 15 new tokens in", err), err
    assert "[carried from --input to the lines with the texts: id]" in err and not (folder / "texts.jsonl.partial").exists()
    answers = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    assert [{name: answer[name] for name in line} for line, answer in zip(lines, answers, strict=True)] == lines
    assert [(answer["new_tokens"], answer["seed"], answer["finish_reason"]) for answer in answers] == [
        (9, 1, "length"), (2, 2, "length"), (4, 5, "length"),
    ]  # fmt: skip
    alone = generate(run_dirs["one"], "--prompt", PROMPT, "--max-new-tokens", 9, "--temperature", 0)[1]
    assert PROMPT + answers[0]["text"] + "\n" == alone
    stop = answers[0]["text"].split()[4]
    stopped = generate(run_dirs["one"], "--prompt", PROMPT, "--max-new-tokens", 9, "--temperature", 0, "--stop", stop)
    assert stopped[1] == alone[: alone.index(stop, len(PROMPT))] + "\n" and "end of text" in stopped[2]


def test_lines_that_cannot_be_met_are_named(run_dirs: dict[str, Path], folder: Path, generate) -> None:
    file = folder / "bad.jsonl"
    for line, message in (
        ('{"prompt": 1}', 'line 1: expected an object with a text "prompt"'),
        ("{", "line 1, is no JSON"),
        ('{"prompt": "t1", "top_p": 2}', "prompt 1: top_p must be"),
        ('{"prompt": "t1", "max_new_tokens": 0}', "max_new_tokens must be a whole number from 1 to 131071, got 0"),
        ('{"prompt": "t1", "max_new_tokens": 1000000000000}', "got 1000000000000; raise --max-length for more"),
        ('{"prompt": "t1", "max_new_tokens": true}', "prompt 1: max_new_tokens must be a whole number, got true"),
        ('{"prompt": "t1", "temperature": "hot"}', 'prompt 1: temperature must be a number, got "hot"'),
        ("", "has no prompts"),
    ):
        file.write_text(line)
        assert_refused(generate(run_dirs["one"], "--input", file), message)


def test_a_prompt_and_its_text_must_fit(run_dirs: dict[str, Path], generate) -> None:
    options = ("--prompt", PROMPT, "--max-new-tokens", 6, "--max-length", 9)
    assert_refused(generate(run_dirs["one"], *options), "a prompt and its new tokens are 10 tokens; raise --max-length, which is 9")


def test_a_mistyped_setting_of_a_line_is_refused_and_other_keys_are_carried(tmp_path: Path) -> None:
    file, carried = tmp_path / "prompts.jsonl", {"id": 1, "prompt_id": "a", "step": 2, "prompt": "t1"}
    file.write_text(json.dumps(carried))
    assert _read_lines(str(file)) == [carried]
    for key, option in {"temprature": "temperature", "topk": "top_k", "max_tokens": "max_new_tokens", "seeds": "seed"}.items():
        file.write_text(json.dumps({"prompt": "t1", key: 1}))
        with pytest.raises(ValueError, match=f"line 1: there is no option '{key}'; did you mean '{option}'"):
            _read_lines(str(file))


def test_an_output_is_looked_at_before_anything_is_loaded(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl.partial"
    prompts.write_text('{"prompt": "t1"}')
    (tmp_path / "same.jsonl").symlink_to(prompts)
    for output, message in (
        ("none/texts.jsonl", "there is no directory"),
        ("prompts.jsonl.partial", "is the --input"),
        ("prompts.jsonl", f"would overwrite {prompts}, which is the --input"),
        ("same.jsonl", "is the --input"),
        (".", "is a directory"),
    ):
        outcome = command("run", "--input", str(prompts), "--output", str(tmp_path / output))
        assert_refused(outcome, message)


def test_a_link_for_an_output_stays_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    link, texts = tmp_path / "link.jsonl", tmp_path / "texts.jsonl"
    link.symlink_to(texts.name)
    monkeypatch.setattr("megatron_hybrid.commands.generate._run", lambda session, requests: [Event(0, 5, "t5", ending="stop")])
    arguments = argparse.Namespace(output=str(link), lines=[{"prompt": "t1"}])
    _write_lines(arguments, [Request(0, [1], 4, Sampling(), seed=0)], None)
    assert link.is_symlink() and json.loads(texts.read_text())["text"] == "t5"


def break_off(arguments: list[str]) -> tuple[int, str]:
    """Exit code and stderr of the command, whose lines are never finished."""

    def only_one(session: Session, requests: Sequence[Request]) -> Iterator[Event]:
        yield Event(0, 5, "t5", ending="stop")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_hybrid.commands.generate._run", only_one)
        code, _, err = command(*arguments)
    return code, err


def test_lines_that_are_not_all_there_leave_the_older_file_alone(run_dirs: dict[str, Path], tmp_path: Path, run_ranks) -> None:
    prompts, texts = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text('{"prompt": "t1"}\n{"prompt": "t2"}\n')
    texts.write_text("older\n")
    ((code, err),) = run_ranks(break_off, 1, [str(run_dirs["one"]), "--input", str(prompts), "--output", str(texts)])
    assert code == 1 and "No space left" in err
    assert texts.read_text() == "older\n" and json.loads((tmp_path / "texts.jsonl.partial").read_text())["text"] == "t5"


@pytest.mark.parametrize("kind", ["text", pytest.param("lines", marks=pytest.mark.slow)])
def test_a_reader_that_has_enough_ends_it_quietly(kind: str, run_dirs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "t1"}\n' * 3)
    source = ["--prompt", "t1"] if kind == "text" else ["--input", str(tmp_path / "prompts.jsonl")]
    arguments = [sys.executable, "-m", "megatron_hybrid", "generate", str(run_dirs["one"]), *source, "--max-new-tokens", "4"]
    reading, writing = os.pipe()
    os.close(reading)
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, stdout=writing, stderr=subprocess.PIPE, text=True, env=hidden, timeout=250)
    os.close(writing)
    assert done.returncode == 0 and re.fullmatch(r"\[.*\]\n", done.stderr), done.stderr


@pytest.mark.slow
def test_several_ranks_print_what_one_prints(run_dirs: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "megatron_hybrid", "generate", str(run_dirs["one"]), "--prompt", PROMPT, "--max-new-tokens", "8"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    texts = {
        subprocess.run([*command, "--seed", "3", *layout], capture_output=True, text=True, check=True, env=hidden, timeout=250).stdout
        for layout in ((), ("--tensor", "2"), ("--pipeline", "2"))
    }
    assert len(texts) == 1 and texts.pop().startswith(PROMPT)


def test_a_checkpoint_can_be_chosen_and_a_damaged_one_is_passed_over(run_dirs: dict[str, Path], generate) -> None:
    options = ("--prompt", PROMPT, "--max-new-tokens", 40, "--seed", 1)
    newest, step_2 = (generate(run_dirs["one"], *options, *which) for which in ((), ("--checkpoint", 2)))
    assert "step_00000004" in newest[2] and "step_00000002" in step_2[2]
    assert newest[1] != step_2[1]
    shard = next((run_dirs["one"] / "checkpoints" / "step_00000004").glob("*.distcp"))
    intact = shard.read_bytes()
    try:
        shard.write_bytes(intact[:5000] + bytes([intact[5000] ^ 1]) + intact[5001:])
        code, out, err = generate(run_dirs["one"], *options)
        assert code == 0 and out == step_2[1] and "step_00000002" in err
        code, out, err = generate(run_dirs["one"], *options, "--checkpoint", 4)
        assert code == 2 and "use another checkpoint" in err and "Traceback" not in err and not out
    finally:
        shard.write_bytes(intact)


def test_what_the_run_directory_lacks_is_named(run_dirs: dict[str, Path], folder: Path, generate) -> None:
    empty = folder / "empty"
    empty.mkdir()
    assert_refused(generate(empty, "--prompt", PROMPT), "no run directory: it has no config.yaml")
    config = (run_dirs["one"] / "config.yaml").read_text()
    (empty / "config.yaml").write_text(config)
    assert_refused(generate(empty, "--prompt", PROMPT), "no sound checkpoint (it has none)")
    (empty / "config.yaml").write_text(config + "surprise: 1\n")
    assert_refused(generate(empty, "--prompt", PROMPT), "unknown option 'surprise'")
    (empty / "config.yaml").write_text(config.replace("tokenizer.json", "gone.json"))
    (empty / "checkpoints").symlink_to(run_dirs["one"] / "checkpoints")
    assert_refused(generate(empty, "--prompt", PROMPT), "gone.json does not exist")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "has no tokens"),
        (("--prompt", "t1", "--temperature", "-1"), "temperature must be"),
        (("--prompt", "t1", "--top-p", "1.5"), "top_p must be"),
        (("--prompt", "t1", "--checkpoint", "3"), "no checkpoint of step 3; it has those of steps 2, 4"),
    ],
)
def test_bad_values_are_one_message_and_code_2(arguments: tuple[str, ...], message: str, run_dirs: dict[str, Path], generate) -> None:
    assert_refused(generate(run_dirs["one"], *arguments), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a --prompt or a --prompt-file"),
        (("--prompt", "t1", "--max-new-tokens", "0"), "--max-new-tokens must be at least 1, got 0"),
        (("--prompt", "t1", "--seed", "-1"), "--seed must be"),
        (("--prompt-file", "none.txt"), "cannot read none.txt: No such file or directory"),
    ],
)
def test_bad_usage_is_refused_before_anything_is_loaded(arguments: tuple[str, ...], message: str) -> None:
    assert_refused(command("run", *arguments), message)


def test_a_prompt_file_must_be_text(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"a\xff")
    assert_refused(command("run", "--prompt-file", str(tmp_path / "bytes")), "no text in UTF-8")


def test_help_has_an_example() -> None:
    code, out, _ = command("--help")
    assert code == 0 and 'generate runs/quickstart/model --prompt "import os"' in out


def assert_refused(outcome: tuple[int, str, str], message: str) -> None:
    code, out, err = outcome
    assert code == 2 and message in err and "Traceback" not in err and not out, outcome
