"""The GPU benchmark's pure parts: what is run, what is refused, and what two runs say of each other."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import fp8_against_transformer_engine, gpu_step
from benchmarks.gpu_step import child_words, make_run, parse
from benchmarks.gpu_step_comparison import compare, length_table, plot_lengths

# of docs/cards/gpu_step.md: one H200, one call
PEER_LOSSES = [12.1867, 10.3683, 8.6497, 6.9433, 5.1479, 3.5578, 1.9035, 0.6552]
OUR_LOSSES = [12.1870, 10.3687, 8.6489, 6.9427, 5.1398, 3.5705, 1.8761, 0.6442]
OUR_LOSSES_IN_FLOAT8 = [12.1846, 10.4911, 8.8509, 7.2208, 5.4595, 3.6758, 2.2406, 0.8325]


def report(tokens_per_s: int = 40000, peak_gib: float = 50.0, losses: list[float] = OUR_LOSSES) -> dict[str, Any]:
    return {"tokens_per_s": tokens_per_s, "peak_gib": peak_gib, "losses": losses, "mfu": tokens_per_s / 70000, "step_s": 0.8}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that looks as if it had what the benchmark needs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_step, "find_spec", lambda name: ModuleSpec(name, None))


@pytest.mark.parametrize("length", [2048, 4096, 8192, 16384, 32768, 65536])
def test_every_length_takes_the_same_tokens(length: int) -> None:
    run = make_run("quarter-8b", "bf16", length=length, tokens=65536)
    assert run.tokens_per_step == 65536 and run.train.global_batch_size == 65536 // length and run.data.sequence_length == length


def test_a_run_is_the_case_unless_told_otherwise() -> None:
    run = make_run("nano-4b", "delayed", deterministic=True, graphs="off", fp8_implementation="cublaslt", kernels={"attention": "sdpa"})
    assert (run.data.sequence_length, run.tokens_per_step, run.model.num_layers) == (4096, 32768, 42)
    assert run.fp8.recipe == "delayed" and run.fp8.implementation == "cublaslt" and run.kernels.attention == "sdpa"
    assert run.runtime.deterministic and run.runtime.cuda_graphs == "off"
    assert make_run("quarter-8b", "bf16").fp8.recipe == "off"


@pytest.mark.parametrize("length", [3000, 65536, 0, -1])
def test_a_length_that_does_not_divide_the_tokens_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"sequences of {length:,} tokens do not divide the 32,768 tokens of a step"):
        make_run("quarter-8b", "bf16", length=length)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--kernels", "foo"], "--kernels takes OPERATION=IMPLEMENTATION, got 'foo'"),
        (["--kernels", "attention=nonsense"], "kernels.attention"),
        (["--kernels", "foo=cpu"], "kernels.foo"),
        (["--fp8-implementation", "nonsense"], "argument --fp8-implementation: invalid choice: 'nonsense'"),
        (["--length", "3000"], "3,000 tokens do not divide the 32,768"),
        (["--lengths", "2048,3000"], "3,000 tokens do not divide the 65,536"),
        (["--lengths", "2k"], "--lengths: takes whole numbers with commas between them, got '2k'"),
        (["--length", "2048", "--lengths", "4096"], "not allowed with"),
        (["--steps", "0"], "--steps must be 1 or more, got 0"),
        (["--plot", "a.png"], "--plot draws what --lengths gives"),
        (["--compare", "deterministic", "--deterministic"], "leave out --system and --deterministic"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_end_with_one_line_about_them(gpu: None, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["quarter-8b", *words])
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_what_a_host_lacks_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        parse(["quarter-8b"])
    assert "torch finds no CUDA device here" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_step, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        parse(["quarter-8b"])
    assert "the peer needs transformer_engine, mamba_ssm, causal_conv1d" in capsys.readouterr().err
    assert parse(["quarter-8b", "--system", "ours"])[0].system == "ours"


def test_a_comparison_without_its_peer_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fp8_against_transformer_engine"])
    monkeypatch.setattr(fp8_against_transformer_engine, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        fp8_against_transformer_engine.main()
    assert "error: it compares with Transformer Engine, which is not installed" in capsys.readouterr().err


def test_a_run_of_its_own_process_is_the_run_asked_for(gpu: None) -> None:
    words = ["nano-4b", "--precision", "current", "--lengths", "8192", "--kernels", "attention=sdpa", "--fp8-implementation", "scaled_mm"]
    options, (run,) = parse([*words, "--graphs", "off", "--steps", "3"])
    child, (same,) = parse(child_words(options, run, "ours", deterministic=True))
    assert same == run.model_copy(update={"runtime": run.runtime.model_copy(update={"deterministic": True})})
    assert child.system == "ours" and child.steps == 3 and child.lengths is None


def test_one_run_that_fails_is_said_in_a_line(gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_step", "quarter-8b"])
    monkeypatch.setattr(subprocess, "run", lambda command, **_: SimpleNamespace(returncode=int("peer" in command), stdout="{}\n"))
    assert gpu_step.main() == 1
    out, err = capsys.readouterr()
    assert err == "gpu_step: peer at 8,192 tokens a sequence failed with exit code 1; its own words stand above\n" and out == "{}\n"


@pytest.mark.parametrize("ours, code", [(OUR_LOSSES, 0), ([*OUR_LOSSES[:3], 6.95, *OUR_LOSSES[4:]], 1)], ids=["equal", "apart"])
def test_losses_that_lie_apart_fail_the_command(
    gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ours: list[float], code: int
) -> None:
    reports = {"peer": report(36000, 60.0, PEER_LOSSES), "ours": report(41000, 51.0, ours)}

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        return SimpleNamespace(returncode=0, stdout=json.dumps(reports[command[command.index("--system") + 1]]) + "\n")

    monkeypatch.setattr(sys, "argv", ["gpu_step", "quarter-8b"])
    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_step.main() == code
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["ratio"] == 1.139 and last["memory"] == 0.85 and last["losses_agree"] == (code == 0)


def test_what_deterministic_algorithms_cost(gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(command: list[str], **_: Any) -> SimpleNamespace:
        assert command[command.index("--system") + 1] == "ours"
        return SimpleNamespace(returncode=0, stdout=json.dumps(report(38000 if "--deterministic" in command else 40000)) + "\n")

    monkeypatch.setattr(sys, "argv", ["gpu_step", "quarter-8b", "--compare", "deterministic"])
    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_step.main() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ratio"] == 0.95


def test_measured_losses_of_both_systems_agree() -> None:
    said = compare(report(37071, 60.40, PEER_LOSSES), report(41304, 51.45, OUR_LOSSES), precision="bf16")
    assert said["ratio"] == 1.114 and said["memory"] == 0.852 and said["losses_agree"]
    assert said["step_of_it"] == 7 and said["largest_loss_difference"] == 0.0274 and said["loss_bound"] == 0.06


def test_float8_passes_its_own_bound_and_not_the_one_of_bf16() -> None:
    pair = report(losses=PEER_LOSSES), report(losses=OUR_LOSSES_IN_FLOAT8)
    assert not compare(*pair, precision="bf16")["losses_agree"] and compare(*pair, precision="delayed")["losses_agree"]


@pytest.mark.parametrize("step", [0, 7])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 9.0], ids=str)
def test_a_wrong_loss_in_any_step_is_found(step: int, wrong: float) -> None:
    losses = [*OUR_LOSSES]
    losses[step] = wrong
    said = compare(report(losses=PEER_LOSSES), report(losses=losses), precision="delayed")
    assert not said["losses_agree"] and said["step_of_it"] == step + 1


def test_runs_of_different_length_are_not_compared() -> None:
    with pytest.raises(ValueError, match="losses of 8 and 7 steps have nothing to compare"):
        compare(report(), report(losses=OUR_LOSSES[:-1]), precision="bf16")


REPORTS = {
    ("peer", 2048): report(30000, 60.0),
    ("ours", 2048): report(36000, 50.0),
    ("peer", 65536): None,
    ("ours", 65536): report(20000, 110.0),
}


def test_the_table_over_lengths_has_a_line_for_each() -> None:
    assert length_table(REPORTS).splitlines() == [
        "  length  system   tokens/s     MFU  peak GiB    s/step   ratio",
        "   2,048  peer       30,000   42.9%     60.00    0.8000",
        "   2,048  ours       36,000   51.4%     50.00    0.8000   1.200",
        "  65,536  peer       failed",
        "  65,536  ours       20,000   28.6%    110.00    0.8000",
    ]


def test_the_plot_over_lengths_is_drawn(tmp_path: Path) -> None:
    plot_lengths(REPORTS, tmp_path / "lengths.png", title="quarter-8b")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
