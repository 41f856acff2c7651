"""Runs that cannot be trained are refused with one clear error each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.config import ConfigError
from megatron_hybrid.config.options import iterate_options
from tests.vision_agglom.small import STUDENT, small_vision_run
from vision_agglom.config.load import dump_config, load_config, student_preset_names
from vision_agglom.config.schema import VisionConfig

TEACHER = {"library": "checkpoint", "model": "x", "pretrained": False}


def load(tmp_path: Path, *overrides: str) -> VisionConfig:
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(small_vision_run(tmp_path)))
    return load_config(file, overrides)


def refusal(tmp_path: Path, **sections: Any) -> str:
    with pytest.raises(ValueError) as error:
        small_vision_run(tmp_path, **sections)
    return str(error.value)


def test_dumped_runs_are_read_back(tmp_path: Path) -> None:
    assert load(tmp_path) == small_vision_run(tmp_path)


def test_overrides_and_nearest_names(tmp_path: Path) -> None:
    assert load(tmp_path, "student.hidden_size=64").student.hidden_size == 64
    with pytest.raises(ConfigError, match="unknown option 'student.hiden_size'; did you mean 'student.hidden_size'"):
        load(tmp_path, "student.hiden_size=64")


def test_a_bad_rate_is_one_problem_and_its_option_an_override(tmp_path: Path) -> None:
    assert load(tmp_path, "stages.0.partitions.1.rate=0.5").stages[0].partitions[1].rate == 0.5
    with pytest.raises(ConfigError) as error:
        load(tmp_path, "stages.0.partitions.0.rate=0.5", "stages.0.partitions.1.rate=0.5")
    (line,) = str(error.value).splitlines()[1:]
    assert line == "  stages.0: every partition has a rate below 1, so some steps would have no images; set one rate to 1"
    with pytest.raises(ConfigError, match=r"stages: expected at least 1 of them, got \[\]"):
        load(tmp_path, "stages=[]")


@pytest.mark.parametrize("name", student_preset_names())
def test_presets_are_students(name: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    text = dump_config(
        small_vision_run(
            tmp_path,
            stages=[{"steps": 1, "partitions": [{"resolutions": [224], "batch_size": 1}]}],
            student={**STUDENT, "patch_size": 16, "max_image_size": 1024},
        )
    )
    before, after = text.index("student:"), text.index("\nteachers:")
    file.write_text(text[:before] + f"student: {name}" + text[after:])
    student = load_config(file).student
    widths = {"vit-b-16": 768, "vit-l-16": 1024, "vit-h-16": 1280, "vit-g-14": 1536, "vit-so400m-16": 1152}
    assert student.hidden_size == widths[name]
    with pytest.raises(ConfigError, match="no preset is called 'vit-x'"):
        load_config(file, ["student=vit-x"])


@pytest.mark.parametrize(
    ("names", "finding"),
    [(("clip", "clip"), "two teachers are called 'clip'"), (("sam", "sam3"), "'sam' and 'sam3': one name begins with the other")],
)
def test_names_that_readers_confuse(names: tuple[str, str], finding: str, tmp_path: Path) -> None:
    assert finding in refusal(tmp_path, teachers=[{"name": name, **TEACHER} for name in names], stages=ONE_STAGE)


ONE_STAGE = [{"steps": 1, "partitions": [{"resolutions": [32], "batch_size": 1}]}]


@pytest.mark.parametrize(
    ("sections", "finding"),
    [
        (
            {"stages": [{"steps": 1, "partitions": [{"resolutions": [50], "batch_size": 1}]}]},
            "50 is no multiple of student.patch_size=8; choose 48 or 56",
        ),
        ({"stages": [{"steps": 1, "partitions": [{"resolutions": [128], "batch_size": 1}]}]}, "exceeds student.max_image_size=64"),
        ({"stages": [{"steps": 1, "partitions": [{"resolutions": [32], "batch_size": 1, "teachers": ["dyno"]}]}]}, "names ['dyno']"),
        ({"stages": [{"steps": 1, "partitions": [{"resolutions": [32], "batch_size": 1, "rate": 0.5}]}]}, "set one rate to 1"),
        (
            {"stages": [{"steps": 1, "partitions": [{"resolutions": [32], "batch_size": 3, "micro_batch_size": 2}]}]},
            "does not divide by micro",
        ),
        ({"student": {"windows": {"sizes": [3]}}, "stages": ONE_STAGE}, "32 has 4 patches a side, which none of"),
        ({"student": {"num_attention_heads": 5}}, "hidden_size=32 does not divide by num_attention_heads=5"),
        ({"student": {"num_registers": 2}}, "exclude each other"),
        ({"parallel": {"tensor": 3}}, "student.num_attention_heads=4 does not divide by parallel.tensor=3"),
        ({"parallel": {"pipeline": 8}}, "fewer than parallel.pipeline x virtual_pipeline=8"),
        ({"parallel": {"pipeline": 2, "stages": (1, 2)}}, "add up to student.num_layers=4"),
        ({"parallel": {"pipeline": 2}, "loss": {"mesa": {"weight": 1.0}}}, "set parallel.pipeline=1 or loss.mesa.weight=0"),
        ({"train": {"teacher_costs": {"clip": 1.0}}}, "teacher_costs is not read with teacher_ranks=all"),
        ({"loss": {"mesa": {"start_step": 5}}}, "not read with weight=0"),
        (
            {"loss": {"smooth_l1_beta": 2.0}, "teachers": [{"name": "clip", **TEACHER}], "stages": ONE_STAGE},
            "smooth_l1_beta=2.0 is not read",
        ),
        ({"loss": {"adaloss_momentum": 0.5}}, "adaloss_momentum is not read with balance=fixed"),
        ({"teachers": [{"name": "sam", **TEACHER, "view": "mosaic"}], "stages": ONE_STAGE}, "view=mosaic gives no summary"),
    ],
)
def test_refusals(sections: dict[str, Any], finding: str, tmp_path: Path) -> None:
    assert finding in refusal(tmp_path, **sections)


def test_a_batch_that_ranks_cannot_share(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stages.0.partitions.1.batch_size=4 does not divide by micro_batch_size=1 x 3 data-parallel"):
        small_vision_run(
            tmp_path,
            stages=[{"steps": 1, "partitions": [{"resolutions": [32], "batch_size": 6}, {"resolutions": [32], "batch_size": 4}]}],
        ).check_data_ranks(3)


def test_every_option_is_documented() -> None:
    for option in iterate_options(VisionConfig):
        assert option.summary
