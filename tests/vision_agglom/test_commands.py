"""The command line: what it prints, what it leaves behind, and one clear error for bad input before anything is trained."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from examples.radio.demo import describe_results
from tests.vision_agglom.teachers.conftest import TWINS
from vision_agglom.__main__ import main

SMALL = Path(__file__).parents[2] / "examples/radio/photographs.yaml"


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
    """Two steps on a few noisy pictures, towards twins of two libraries' models."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(generator.integers(0, 255, (80, 96, 3), np.uint8)).save(folder / "images" / f"{index}.png")
    images = {"sources": {"noise": {"path": str(folder / "images")}}, "num_workers": 0}
    run = {
        "run_dir": str(folder / "run"),
        "student": {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 64, "max_image_size": 128},
        "teachers": [
            {"name": "siglip", "model": "siglip", "pretrained": False, **TWINS["siglip"]},
            {"name": "sam", "model": "sam", "pretrained": False, **TWINS["sam"], "view": "mosaic", "summary_loss": "none"},
        ],
        "images": images,
        "stages": [{"steps": 2, "partitions": [{"resolutions": [64], "batch_size": 4, "micro_batch_size": 2}]}],
        "optimizer": {"lr": 1e-3},
        "train": {"precision": "fp32", "teacher_precision": "fp32"},
        "validation": {"sources": {"again": images}, "every_steps": 2, "num_batches": 1},
        "evaluation": {"images": str(folder / "images"), "max_images": 4, "resolutions": [64, 128]},
        "runtime": {"threads_per_rank": 1},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    return file


def test_trains_evaluates_and_exports(config: Path, run_ranks) -> None:
    run_dir = config.parent / "run"
    ((code, out, err),) = run_ranks(command, 1, ["train", str(config)])
    assert code == 0, err
    assert [line.split()[1] for line in out.splitlines() if line.lstrip().startswith("step")] == ["1/2", "2/2"]
    assert "img/s" in out and "siglip.summary" in out and "again" in out
    assert {path.name for path in run_dir.iterdir()} >= {"config.yaml", "starts.jsonl", "metrics.jsonl", "loss.png", "checkpoints"}
    ((code, _, err),) = run_ranks(command, 1, ["evaluate", str(run_dir)])
    assert code == 2 and "teacher 'siglip' takes images of 64 pixels only, and for 8 patches a side" in err
    ((code, out, err),) = run_ranks(command, 1, ["evaluate", str(run_dir), "evaluation.resolutions=[64]"])
    assert code == 0, err
    assert "fidelity at" in out
    assert {path.name for path in run_dir.iterdir()} >= {"evaluation.json", "evaluation.png", "features.png"}
    # The demo ends with the pictures that are there, the curves over resolution among them.
    assert all(str(picture) in describe_results(str(run_dir)) for picture in run_dir.glob("*.png"))
    assert str(run_dir / "evaluation.png") in out
    ((code, out, err),) = run_ranks(command, 1, ["export", str(run_dir), str(config.parent / "out"), "--formats", "hub", "transformers"])
    assert code == 0, err
    assert (config.parent / "out" / "radio.pth").exists() and (config.parent / "out" / "transformers" / "config.json").exists()
    ((code, out, err),) = run_ranks(command, 1, ["train", str(config)])
    assert code == 0 and "nothing to do" in out


def test_describe_says_what_a_run_is(config: Path) -> None:
    code, out, _ = command(["describe", str(config), "parallel.pipeline=2"])
    assert code == 0
    assert "2 blocks, width 32" in out and "blocks 0-0, 1-1" in out and "2 steps, 8 images" in out


def test_help_shows_an_example() -> None:
    for arguments in (["--help"], *([verb, "--help"] for verb in ("describe", "train", "evaluate", "export"))):
        code, out, _ = command(arguments)
        assert code == 0 and "python -m vision_agglom" in out


@pytest.mark.parametrize(
    ("arguments", "finding"),
    [
        (["student.hiden_size=3"], "did you mean 'student.hidden_size'"),
        (["images={sources: {noise: {path: nowhere}}}"], "nowhere: no such file or folder"),
        (["runtime.device=cuda"], "torch finds no CUDA device here"),
    ],
)
def test_bad_input_is_one_error(arguments: list[str], finding: str, config: Path, tmp_path: Path, run_ranks) -> None:
    ((code, _, err),) = run_ranks(command, 1, ["train", str(config), f"run_dir={tmp_path / 'run'}", *arguments])
    assert code == 2 and finding in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_evaluate_needs_a_run_directory(tmp_path: Path) -> None:
    code, _, err = command(["evaluate", str(tmp_path)])
    assert code == 2 and "is no run directory" in err


@pytest.mark.parametrize(
    ("output", "options", "finding"),
    [
        ("out", ["--image-side", "100"], "--image-side: 100 is no multiple of student.patch_size=16; choose 96 or 112"),
        ("out", ["--image-side", "0"], "--image-side: 0 is no multiple of student.patch_size=16; choose 16"),
        ("out", ["--image-side", "256"], "--image-side: 256 exceeds student.max_image_size=128"),
        ("run.yaml", [], "is a file; name a folder"),
        ("run.yaml/below", [], "is a file; name a folder"),
    ],
)
def test_export_refuses_before_it_reads_a_checkpoint(output: str, options: list[str], finding: str, config: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "run.yaml"):
        (tmp_path / name).write_text(config.read_text())
    code, _, err = command(["export", str(tmp_path), str(tmp_path / output), *options])
    assert code == 2 and finding in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_evaluated_is_refused_where_it_would_be_and_not_by_export(config: Path, tmp_path: Path) -> None:
    run = yaml.safe_load(config.read_text())
    run["evaluation"] |= {"labelled_train": "x", "labelled_test": "x", "zero_shot": {"teacher": "sam", "class_names": ["a", "b"]}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(run))
    for arguments in (["train", str(file)], ["describe", str(file)], ["evaluate", str(tmp_path)]):
        code, _, err = command(arguments)
        assert code == 2 and err == "error: evaluation.zero_shot.teacher=sam: expected one whose summary is learned, of ['siglip']\n"
    code, _, err = command(["export", str(tmp_path), str(tmp_path / "out"), "--image-side", "100"])
    assert code == 2 and "zero_shot" not in err and "--image-side: 100 is no multiple" in err
