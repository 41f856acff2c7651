"""The whole evaluation of a student, against what its parts say of features computed here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hybrid.substrate.groups import initialize, shutdown
from vision_agglom.config.schema import VisionConfig
from vision_agglom.evaluate.knn import accuracy, knn_predict
from vision_agglom.evaluate.pictures import draw_curves, draw_features
from vision_agglom.evaluate.report import CONTROL, Evaluation, Report, format_report
from vision_agglom.evaluate.zero_shot import embed_classes, load_text_tower, zero_shot_predict
from vision_agglom.images.labelled import read_labelled
from vision_agglom.images.open_source import open_source
from vision_agglom.images.pack import encode_png, write_shards
from vision_agglom.images.records import Record
from vision_agglom.images.scenes import NUM_SCENE_CLASSES, draw_scene
from vision_agglom.plain.radio import PlainHeadShape, PlainRadio
from vision_agglom.plain.vit import PlainViTShape
from vision_agglom.teachers import load_teacher
from vision_agglom.teachers.tower import build_seeded

CLASS_NAMES = ["ground", "disc", "square", "triangle", "ring", "cross", "star", "bars"]


def make_scenes(prefix: Path, first: int, count: int) -> None:
    """Labelled scenes of 64 pixels."""
    drawn = [draw_scene(index, side=64) for index in range(first, first + count)]
    write_shards((Record("x.png", encode_png(each.image), each.class_index, encode_png(each.mask)) for each in drawn), prefix, 100)


@pytest.fixture
def run(tmp_path: Path, clip: Path) -> VisionConfig:
    """A run of two teachers: a CLIP with texts, and a SAM that sees mosaics."""
    make_scenes(tmp_path / "train/x", 0, 12)
    make_scenes(tmp_path / "test/x", 12, 6)
    sam = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 128, "patch_size": 16, "mlp_dim": 16}
    return VisionConfig.model_validate(
        {
            "run_dir": tmp_path / "run",
            "student": {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 64, "max_image_size": 64},
            "teachers": [
                {"name": "clip", "library": "transformers", "model": str(clip), "sides": "any"},
                {
                    "name": "sam",
                    "library": "transformers",
                    "model": "sam",
                    "pretrained": False,
                    "options": sam | {"window_size": 2, "global_attn_indexes": [0], "output_channels": 8},
                    "view": "mosaic",
                    "summary_loss": "none",
                },
            ],
            "images": {"sources": {"x": {"path": str(tmp_path / "train")}}, "num_workers": 0},
            "stages": [{"steps": 1, "partitions": [{"resolutions": [32], "batch_size": 1}]}],
            "optimizer": {"lr": 1e-3},
            "train": {"precision": "fp32", "teacher_precision": "fp32"},
            "evaluation": {
                "images": str(tmp_path / "test"),
                "resolutions": [16, 64],
                "labelled_train": str(tmp_path / "train"),
                "labelled_test": str(tmp_path / "test"),
                "num_classes": NUM_SCENE_CLASSES,
                "batch_size": 4,
                "zero_shot": {"teacher": "clip", "class_names": CLASS_NAMES},
            },
            "runtime": {"threads_per_rank": 1},
        }
    )


def student() -> PlainRadio:
    """Random, with heads of the teachers' widths."""
    heads = (PlainHeadShape("clip", 0, 24, 16, 32), PlainHeadShape("sam", 1, None, 16, 32))
    shape = PlainViTShape(32, 2, 4, num_cls_tokens=2, summary_idxs=(0,), mlp_hidden_size=64, table_side=4)
    return build_seeded(0, lambda: PlainRadio(shape, heads)).eval()


def evaluate(run: VisionConfig) -> tuple[Report, str]:
    """On one rank, with both pictures."""
    substrate = initialize(run)
    teachers = {teacher.name: load_teacher(teacher, "cpu", torch.float32) for teacher in run.teachers}
    evaluation = Evaluation(run, student(), 7, teachers, substrate)
    report = evaluation.report()
    run.run_dir.mkdir()
    shown = evaluation.shown()
    assert shown is not None
    draw_features(shown, run.run_dir / "features.png")
    draw_curves(report, run.run_dir / "evaluation.png")
    shutdown(substrate)
    return report, format_report(report)


def test_the_report_is_what_its_parts_say(run_ranks: Callable[..., list[Any]], run: VisionConfig) -> None:
    ((report, text),) = run_ranks(evaluate, 1, run)
    assert set(report.spatial) == {"clip", "sam"} and set(report.summary) == {"clip"}
    assert list(report.curves["clip"]) == [16, 32, 64] and list(report.equivariance) == [16, 64]
    assert report.curves["sam"][32] == pytest.approx(report.spatial["sam"])
    assert set(report.rankme) == {"student", "clip", "sam", "head of clip", "head of sam"}
    assert set(report.probes) == {"student", "clip", CONTROL}, "a mosaic's images have no features of their own size"
    assert report.probes[CONTROL]["linear"] == 1.0 > report.probes["student"]["linear"], "the probes find what is there"
    json.dumps(report.to_json())
    for word in ("fidelity", "scale error", "kNN", "zero-shot", "head of clip"[8:]):
        assert word in text
    assert all((run.run_dir / name).stat().st_size > 10_000 for name in ("features.png", "evaluation.png"))

    options = run.evaluation
    (train,) = read_labelled(open_source(str(options.labelled_train)), resolution=32, batch_size=50)
    (test,) = read_labelled(open_source(str(options.labelled_test)), resolution=32, batch_size=50)
    teacher = load_teacher(run.teachers[0], "cpu", torch.float32)
    with torch.no_grad():
        vectors, queries, features = student()(train.images_BCHW)[0], student()(test.images_BCHW)[0], student().features(test.images_BCHW)
    predicted = knn_predict(vectors, train.classes_B, queries, num_classes=NUM_SCENE_CLASSES)
    assert report.probes["student"]["knn"] == pytest.approx(accuracy(predicted, test.classes_B))
    described = teacher(test.images_BCHW)
    mse = (features.adaptors["clip"].spatial_BTC - described.spatial_BTC).double().square().mean()
    assert report.spatial["clip"]["mse"] == pytest.approx(float(mse), rel=1e-5)
    classes = embed_classes(load_text_tower("transformers", run.teachers[0].model, "cpu"), CLASS_NAMES)
    for name, summary in (("student", features.adaptors["clip"].summary_BC), ("clip", described.summary_BC)):
        assert report.zero_shot[name] == pytest.approx(accuracy(zero_shot_predict(summary, classes), test.classes_B)), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labelled_test": None}, "give labelled_train and labelled_test together"),
        ({"labelled_train": None, "labelled_test": None}, "zero_shot needs labelled_train and labelled_test"),
        ({"num_classes": 5}, "class_names has 8 names for num_classes=5"),
    ],
)
def test_options_that_do_not_fit_are_refused(run: VisionConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        type(run.evaluation).model_validate(run.evaluation.model_dump() | changes)


def test_labels_beyond_the_classes_are_refused_before_anything_is_computed(run: VisionConfig) -> None:
    options = run.evaluation.model_copy(update={"num_classes": 4, "zero_shot": None})
    other = run.model_copy(update={"evaluation": options})
    teachers = {teacher.name: load_teacher(teacher, "cpu", torch.float32) for teacher in run.teachers}
    with pytest.raises(ValueError, match=r"of .*train: its (class|mask) has class \d, but evaluation.num_classes=4 has those from 0 to 3"):
        Evaluation(other, student(), 0, teachers, None)  # type: ignore[arg-type]


def test_a_text_tower_that_is_not_there_is_refused_by_its_teachers_name(run: VisionConfig, tmp_path: Path) -> None:
    zero_shot = run.evaluation.zero_shot.model_copy(update={"text_model": str(tmp_path / "nowhere")})
    other = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"zero_shot": zero_shot})})
    teachers = {teacher.name: load_teacher(teacher, "cpu", torch.float32) for teacher in run.teachers}
    substrate = SimpleNamespace(device="cpu")
    with pytest.raises(ValueError, match=r"zero_shot.teacher=clip: transformers cannot load the text tower '.*nowhere'"):
        Evaluation(other, student(), 0, teachers, substrate)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("teacher", "zero_shot", "message"),
    [
        ({}, {"teacher": "sam"}, r"zero_shot.teacher=sam: expected one whose summary is learned, of \['clip'\]"),
        (
            {"pretrained": False, "model": "clip"},
            {},
            "zero_shot.teacher=clip has pretrained=false, .* give evaluation.zero_shot.text_model",
        ),
        ({"library": "timm"}, {}, "zero_shot.teacher=clip: library=timm has no text towers; name a teacher of transformers or open_clip"),
    ],
)
def test_zero_shot_needs_a_teacher_with_texts(run: VisionConfig, teacher: dict[str, Any], zero_shot: dict[str, Any], message: str) -> None:
    tree = run.model_dump()
    tree["teachers"] = [tree["teachers"][0] | teacher, tree["teachers"][1]]
    tree["evaluation"]["zero_shot"] |= zero_shot
    run.check_evaluation()
    with pytest.raises(ValueError, match=message):
        VisionConfig.model_validate(tree).check_evaluation()
