"""`describe` shows a model in a layout: for people in columns, for programs as JSON, at once and without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megatron_hybrid.describe import main
from megatron_hybrid.layout.flops import training_flops_per_token
from tests.layout.shapes import preset

LAYOUT = ["nemotron-h-8b", "parallel.tensor=8", "parallel.pipeline=4", "parallel.virtual_pipeline=2", "data.sequence_length=4096"]


def describe(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert not printed.err
    return printed.out


def test_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(describe(capsys, *LAYOUT, "--json"))
    assert report["parameters"] == 8_100_852_736
    assert report["training_flops"] == training_flops_per_token(preset("nemotron-h-8b"), 4096)
    for amount in ("parameters", "training_flops"):
        assert sum(part["count"] * part[f"{amount}_each"] for part in report["parts"]) == report[amount]
        assert sum(stage[amount] for stage in report["stages"]) == report[amount]
    assert report["pattern"] == "|".join(stage["pattern"] for stage in report["stages"])
    assert report["pattern"].replace("|", "") == preset("nemotron-h-8b").pattern


def test_virtual_stages_go_round_the_pipeline_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    stages = json.loads(describe(capsys, "--json", *LAYOUT))["stages"]
    assert [(stage["pipeline_rank"], stage["chunk"]) for stage in stages] == [(rank, chunk) for chunk in (0, 1) for rank in range(4)]


def test_text_shows_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    text = describe(capsys, *LAYOUT)
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["nemotron-h-8b:"][1] == "8,100,852,736"
    assert lines["mamba"][1:4] == ["24", "109,640,064", "2,631,361,536"]
    assert lines["attention"][1:3] == ["4", "41,947,136"]
    assert lines["head"][1:3] == ["is", "the"] and "536,875,008" in text
    assert "Stages, tensor 8 x pipeline 4, 2 per pipeline rank" in text
    assert "Most parameters on one rank: " in text and "Most work on one pipeline rank: 1." in text


def test_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = describe(capsys, *LAYOUT).split("\n\n")
    for block in blocks[2:4]:
        title, *table = [line for line in block.splitlines() if not line.startswith("  head is")]
        assert len({len(line) for line in table}) == 1, title


def test_a_long_pattern_is_wrapped_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    block = describe(capsys, "nemotron-h-56b", "parallel.pipeline=8").split("\n\n")[1]
    title, *lines = block.splitlines()
    assert title == "Pattern, 118 layers, cut into stages at |"
    assert max(map(len, lines)) <= 82
    assert "".join(line.strip() for line in lines).replace("|", "") == preset("nemotron-h-56b").pattern


def test_float8_is_planned_linear_by_linear(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["nemotron-h-4b", "parallel.tensor=2", "fp8.recipe=delayed", "fp8.bf16_layers_at_start=2", "fp8.bf16_layers_at_end=2"]
    title, _, *rows = describe(capsys, *options).strip().split("\n\n")[-1].splitlines()
    assert title == "Linears, fp8.recipe=delayed: 74 of 104 in float8; embedding and output layer never are"
    assert [row.split(maxsplit=3)[:3] for row in rows[:2]] == [["in_proj", "24", "0"], ["out_proj", "24", "22"]]
    assert rows[0].endswith("2 at the ends; 8,248 x 3,072 per rank, not multiples of 16") and rows[1].endswith("2 at the ends")
    precisions = json.loads(describe(capsys, *options, "fp8.linears=[linear_fc1]", "--json"))["precisions"]
    fc1, fc2 = precisions[-2:]
    assert (fc1["linear"], fc1["float8"], fc2["float8"], fc2["reason"]) == ("linear_fc1", fc1["count"] - 2, 0, "not in fp8.linears")
    assert "float8" not in describe(capsys, "nemotron-h-4b", "parallel.tensor=2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nemotron-h-4b", "fp8.recipe=delayed", "fp8.bf16_layers_at_start=52"], "no linear would run in float8"),
        (["nemotron-h-4b", "fp8.bf16_layers_at_start=2"], "recipe=off reads no other option"),
        (["nemotron-h-9b"], "did you mean 'nemotron-h-8b'?"),
        (["nemotron-h-8b", "parallel.tensr=2"], "did you mean 'parallel.tensor'?"),
        (["nemotron-h-8b", "parallel.tensor=3"], "does not divide by parallel.tensor=3"),
        (["none.yaml"], "No such file"),
    ],
)
def test_a_mistake_is_one_message_on_stderr_and_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "Traceback" not in printed.err and not printed.out


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert "describe nemotron-h-8b parallel.tensor=8" in capsys.readouterr().out


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys; from megatron_hybrid.describe import main; main(['nemotron-h-56b', 'parallel.pipeline=8']); "
        "heavy = {'torch', 'megatron', 'numpy', 'transformers'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, timeout=60)
