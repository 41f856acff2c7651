"""The pretrain command: what it prints, and one clear error for each kind of bad input, before anything is trained."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from megatron_hybrid.__main__ import main
from megatron_hybrid.config import dump_config, load_config
from megatron_hybrid.substrate.exit_codes import ExitCode
from tests.runs import small_run, write_corpus


def command(arguments: list[str]) -> tuple[int, str, str]:
    """Run the command in this process; runs on one rank."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    return int(code or 0), out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    write_corpus(folder / "text")
    file = folder / "run.yaml"
    file.write_text(dump_config(small_run(folder)))
    return file


def test_trains_and_leaves_a_self_contained_run_directory(config: Path, tmp_path: Path, run_ranks) -> None:
    ((code, out, err),) = run_ranks(command, 1, ["pretrain", str(config), f"run_dir={tmp_path / 'run'}", "train.steps=3"])
    assert code == ExitCode.FINISHED, err
    assert [line.split()[1] for line in out.splitlines() if line.lstrip().startswith("step")] == ["1/3", "2/3", "3/3"]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"config.yaml", "starts.jsonl", "metrics.jsonl", "loss.png", "checkpoints"}
    assert load_config(tmp_path / "run" / "config.yaml", []).train.steps == 3


def test_prints_the_resolved_run(config: Path) -> None:
    code, out, _ = command(["pretrain", str(config), "parallel.tensor=2", "--print-config"])
    assert code == 0
    assert "tensor: 2" in out


def test_help_shows_an_example(config: Path) -> None:
    for arguments in (["--help"], ["pretrain", "--help"], ["describe", "--help"], ["generate", "--help"]):
        code, out, _ = command(arguments)
        assert code == 0
        assert "python -m megatron_hybrid" in out


BAD_INPUT = {
    "typo": (["parallel.tensr=2"], "parallel.tensor"),
    "wrong type": (["train.steps=many"], "train.steps"),
    "heads do not divide": (["parallel.tensor=3"], "parallel.tensor=3"),
    "layers not covered": (["parallel.pipeline=2", "parallel.stages=[3,4]"], "stages"),
    "more stages than layers": (["parallel.pipeline=9"], "9"),
    "batch does not divide": (["train.global_batch_size=7", "train.micro_batch_size=2"], "global_batch_size=7"),
    "ranks do not fit": (["parallel.data=2"], "parallel.data=2"),
    "missing corpus": (["data.sources.text=/nowhere/text"], "/nowhere/text"),
    "missing tokenizer": (["data.tokenizer={path: /nowhere/t.model}"], "/nowhere/t.model"),
    "sample longer than the corpus": (["data.sequence_length=1000000"], "text"),
    "ids beyond the vocabulary": (["model.vocab_size=100"], "vocab_size=100"),
    "weights from nowhere": (["checkpoint.initialize_from=/nowhere/step_1"], "/nowhere/step_1"),
    "warm-up longer than the run": (["schedule={kind: cosine, warmup_tokens: 1B}"], "warmup_tokens"),
    "unusable run directory": (["run_dir=/proc/run"], "/proc/run"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_error(case: str, config: Path, tmp_path: Path, run_ranks) -> None:
    overrides, named = BAD_INPUT[case]
    ((code, out, err),) = run_ranks(command, 1, ["pretrain", str(config), f"run_dir={tmp_path / 'run'}", *overrides])
    assert code == ExitCode.BAD_INPUT, (code, err)
    assert named in err
    assert "Traceback" not in err
    assert not any(line.lstrip().startswith("step") for line in out.splitlines())


def test_truncated_corpus(config: Path, tmp_path: Path, run_ranks) -> None:
    write_corpus(tmp_path / "text")
    content = (tmp_path / "text.bin").read_bytes()
    (tmp_path / "text.bin").write_bytes(content[: len(content) // 2])
    ((code, _, err),) = run_ranks(
        command, 1, ["pretrain", str(config), f"run_dir={tmp_path / 'run'}", f"data.sources.text={tmp_path / 'text'}"]
    )
    assert code == ExitCode.BAD_INPUT
    assert "text.bin" in err


def test_missing_file(tmp_path: Path) -> None:
    code, _, err = command(["pretrain", str(tmp_path / "absent.yaml")])
    assert code == ExitCode.BAD_INPUT
    assert "absent.yaml" in err
