"""From a run directory to the student in plain torch: the same function, whatever layout trained it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.checkpoint.store import step_name
from megatron_hybrid.config.run_directory import CONFIG_NAME
from megatron_hybrid.substrate.groups import initialize, shutdown
from megatron_hybrid.train.trainer import Trainer
from tests.vision_agglom.small import RandomTeacher, SyntheticStream, small_vision_run, synthetic_image
from vision_agglom.config.load import dump_config
from vision_agglom.config.schema import VisionConfig
from vision_agglom.students.build import build_transformer_config
from vision_agglom.task import Distillation
from vision_agglom.trained import load_run, load_trained

Outputs = dict[str, torch.Tensor]


def images() -> torch.Tensor:
    """Not square, so that rows and columns cannot be confused."""
    return torch.stack([synthetic_image(index, 48)[:, :40] for index in range(3)])


def train_and_describe(run: VisionConfig) -> Outputs:
    """Train, save, and say what the trained student, its heads and the teachers' denormalisers make of the images."""
    substrate = initialize(run)
    config = build_transformer_config(run, substrate)
    task = Distillation(run, config, substrate, load=RandomTeacher, open_stream=SyntheticStream)
    trainer = Trainer(run, task, config, substrate, [], task.plan.learning_rate)
    run.run_dir.mkdir(exist_ok=True)
    (run.run_dir / CONFIG_NAME).write_text(dump_config(run))
    trainer.train()
    outputs = describe(task)
    shutdown(substrate)
    return outputs


def describe(task: Distillation) -> Outputs:
    """What a student says of the images, its heads in the teachers' own spaces."""
    (chunk,) = task.chunks
    chunk.eval()
    outputs: Outputs = {}
    with torch.no_grad():
        features = chunk(images())
        outputs["prefix"], outputs["spatial"] = features.prefix_BSD, features.patches_BTD
        for index, name in enumerate(task.run.teacher_names):
            spatial = chunk.heads.spatial[name](features.patches_BTD)
            outputs[f"{name}.spatial"] = task.trackers[name].head_space.denormalize(spatial)
            if name in chunk.heads.summary:
                outputs[f"{name}.summary"] = chunk.heads.summary[name](features.prefix_BSD[:, index])
    return outputs


def load_and_describe(run_dir: Path) -> tuple[Outputs, int]:
    """The same of the plain student."""
    run = load_run(run_dir)
    substrate = initialize(run)
    student = load_trained(run, run_dir, substrate)
    with torch.no_grad():
        features = student.radio.features(images())
        outputs = {"summary": features.summary_BC, "spatial": features.spatial_BTC}
        for name, adaptor in features.adaptors.items():
            outputs[f"{name}.spatial"] = adaptor.spatial_BTC
            if adaptor.summary_BC is not None:
                outputs[f"{name}.summary"] = adaptor.summary_BC
    shutdown(substrate)
    return outputs, student.step


def load_refused(run_dir: Path, step: int | None) -> str:
    """The message with which loading is refused."""
    run = load_run(run_dir)
    substrate = initialize(run)
    with pytest.raises(ValueError) as caught:
        load_trained(run, run_dir, substrate, step=step)
    shutdown(substrate)
    return str(caught.value)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "student": {"spectral_reparam": True, "mlp": "swiglu", "layer_scale": 0.5, "final_norm": True, "damp_std": 0.1},
        "heads": {"num_inner": 1},
        "loss": {"balance": "uncertainty"},
        "parallel": {"tensor": 2, "sequence_parallel": True},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_plain_student_is_the_trained_one(run_ranks: Callable[..., list[Any]], tmp_path: Path, variant: str) -> None:
    options = VARIANTS[variant]
    run = small_vision_run(tmp_path, **options)
    (expected, *_) = run_ranks(train_and_describe, run.parallel.tensor, run)
    ((got, step),) = run_ranks(load_and_describe, 1, run.run_dir)
    assert step == run.total_steps
    width = run.student.hidden_size
    summaries = [index for index, teacher in enumerate(run.teachers) if teacher.summary_loss != "none"]
    torch.testing.assert_close(got["summary"], expected["prefix"][:, summaries].reshape(3, len(summaries) * width), rtol=1e-5, atol=1e-5)
    assert set(got) - {"summary"} == set(expected) - {"prefix"}
    for name in set(expected) - {"prefix"}:
        scale = expected[name].abs().max()
        assert (got[name] - expected[name]).abs().max() <= 1e-5 * scale, name


def test_what_cannot_be_loaded_is_refused(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    run = small_vision_run(tmp_path)
    run_ranks(train_and_describe, 1, run)
    (message,) = run_ranks(load_refused, 1, run.run_dir, 3)
    assert "has no checkpoint of step 3; it has those of steps 4" in message
    other = run.model_copy(update={"student": run.student.model_copy(update={"hidden_size": 64})})
    (run.run_dir / CONFIG_NAME).write_text(dump_config(other))
    (message,) = run_ranks(load_refused, 1, run.run_dir, None)
    assert "is of another student than its config.yaml says: hidden_size differ" in message
    with pytest.raises(ValueError, match="is no run directory: it has no config.yaml"):
        load_run(tmp_path / "nowhere")


def start_and_describe(run: VisionConfig) -> tuple[Outputs, Outputs]:
    """What a run that starts from another's weights says at once, and turned to its own first targets."""
    substrate = initialize(run)
    config = build_transformer_config(run, substrate)
    task = Distillation(run, config, substrate, load=RandomTeacher, open_stream=SyntheticStream)
    trainer = Trainer(run, task, config, substrate, [], task.plan.learning_rate)
    trainer.resume()
    before = describe(task)
    next(task.training_data(0))
    turned: Outputs = {}
    with torch.no_grad():
        for name, tracker in task.trackers.items():
            assert name != "clip" or tracker.turn is not None, "its targets are no longer those of the head"
            spatial = task.chunks[0].heads.spatial[name](before["spatial"], tracker.turn)
            turned[f"{name}.spatial"] = tracker.transformation.denormalize(spatial)
    shutdown(substrate)
    return before, turned


@pytest.mark.parametrize("variant", [{}, {"student": {"spectral_reparam": True}}], ids=["plain", "spectral"])
def test_weights_of_another_run_say_the_same_of_the_same_teachers(
    run_ranks: Callable[..., list[Any]], tmp_path: Path, variant: dict[str, Any]
) -> None:
    """Towards other targets, where the resume refusal sends the user: another standardizer, another model by the name of dino."""
    first = small_vision_run(tmp_path, **variant)
    (expected,) = run_ranks(train_and_describe, 1, first)
    second = small_vision_run(
        tmp_path / "second", seed=7, checkpoint={"initialize_from": first.run_dir / "checkpoints" / step_name(first.total_steps)}, **variant
    )
    clip, dino, sam = second.teachers
    teachers = (clip.model_copy(update={"standardizer": "zca"}), dino.model_copy(update={"model": "another"}), sam)
    ((before, turned),) = run_ranks(start_and_describe, 1, second.model_copy(update={"teachers": teachers}))
    for name in set(expected) - {"dino.spatial"}:
        torch.testing.assert_close(before[name], expected[name], rtol=1e-6, atol=1e-6 * float(expected[name].abs().max()), msg=name)
    for name in ("clip.spatial", "sam.spatial"):
        assert (turned[name] - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name
    assert not torch.allclose(before["dino.spatial"], expected["dino.spatial"], rtol=0.1)
