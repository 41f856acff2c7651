"""Distillation: the same losses in every layout, nothing learned from oneself, resume, and teachers that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hybrid.config import ModelConfig, ParallelConfig, RunConfig
from megatron_hybrid.substrate.groups import initialize, shutdown
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from megatron_hybrid.tasks.distill import Distillation, DistillOptions
from megatron_hybrid.tasks.layer_losses import LayerLossOptions, LayerPair, check_layer_losses
from megatron_hybrid.train.trainer import Trainer
from tests.runs import MODEL, small_run, write_corpus
from tests.train.training import Outcome, Recorder, raised_by, train

TEACHER = {"pattern": "M-*M-M-*", "hidden_size": 80}
STUDENT = {"pattern": "M-*M-"}
LAYOUTS = {
    "tp2": {"tensor": 2},
    "tp2-sp": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
    "dp2": {"data": 2},
    "pp2-vpp2": {"pipeline": 2, "virtual_pipeline": 2},
}
FOUR_RANKS = {
    "tp2-pp2-sp": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
    "pp2-dp2": {"pipeline": 2, "data": 2},
    "pp4": {"pipeline": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rank_pool) -> Path:
    """A folder with text and a teacher of another width than the student."""
    folder = tmp_path_factory.mktemp("distil")
    write_corpus(folder / "text")
    rank_pool.run(train, 1, small_run(folder, run_dir=folder / "teacher", model=TEACHER))
    return folder


def options_for(folder: Path, **changes) -> DistillOptions:
    return DistillOptions(folder / "teacher/checkpoints/step_00000005", **changes)


def distill_run(run: RunConfig, options: DistillOptions) -> tuple[Outcome, list[dict[str, float]]]:
    """Distil to the end or a stop; runs on every rank. Returns the outcome and every step's metrics."""
    substrate = initialize(run)
    task = Distillation(run, options, build_transformer_config(run, substrate), substrate)
    outcome, metrics = Outcome(), []

    class Metrics(Recorder):
        def after_step(self, trainer, record) -> None:
            super().after_step(trainer, record)
            metrics.append(record.metrics)

    trainer = Trainer(run, task, task.pipeline_config, substrate, [Metrics(outcome)])
    trainer.resume()
    outcome.exit_code = int(trainer.train())
    for chunk in trainer.chunks:
        outcome.weights |= {name: parameter.detach().clone() for name, parameter in chunk.module.named_global_parameters()}
    shutdown(substrate)
    return outcome, metrics


def student_run(folder: Path, name: str, **sections) -> RunConfig:
    return small_run(folder, run_dir=folder / name, **{"model": STUDENT, **sections})


ALL_TERMS = {"temperature": 1.5, "lm_loss_weight": 0.3}


@pytest.fixture(scope="module")
def one_rank(folder: Path, rank_pool) -> list[dict[str, float]]:
    return rank_pool.run(distill_run, 1, student_run(folder, "one-rank"), options_for(folder, **ALL_TERMS))[0][1]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_layout_changes_the_losses(layout: dict, folder: Path, one_rank, run_ranks) -> None:
    check_layout(layout, folder, one_rank, run_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR_RANKS.values(), ids=FOUR_RANKS)
def test_no_layout_of_four_ranks_does(layout: dict, folder: Path, one_rank, run_ranks) -> None:
    check_layout(layout, folder, one_rank, run_ranks)


def check_layout(layout: dict, folder: Path, one_rank, run_ranks) -> None:
    world_size = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)
    run = student_run(folder, "-".join(map(str, layout.items())), parallel=layout)
    for _, metrics in run_ranks(distill_run, world_size, run, options_for(folder, **ALL_TERMS)):
        for step, expected in zip(metrics, one_rank, strict=True):
            assert step == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_the_sum_of_its_terms_and_falls(folder: Path, one_rank) -> None:
    for step in one_rank:
        assert step["loss"] == pytest.approx(step["kl"] + 0.3 * step["lm_loss"], rel=1e-5)
    assert one_rank[-1]["kl"] < one_rank[0]["kl"]


def test_hidden_states_too_in_any_layout(folder: Path, run_ranks) -> None:
    model = {**STUDENT, "hidden_size": 80}
    options = options_for(folder, hidden_loss_weight=2.0)
    (one,) = run_ranks(distill_run, 1, student_run(folder, "hidden-1", model=model), options)
    parallel = {"tensor": 2, "sequence_parallel": True}
    for _, metrics in run_ranks(distill_run, 2, student_run(folder, "hidden-2", model=model, parallel=parallel), options):
        for step, expected in zip(metrics, one[1], strict=True):
            assert step == pytest.approx(expected, rel=1e-5)
    assert 0 < one[1][-1]["hidden"] < one[1][0]["hidden"]


LAYER_MODEL = {**STUDENT, "hidden_size": 80}
LAYER_PAIRS = (LayerPair(0, 0), LayerPair(2, 3, weight=2.0), LayerPair(4, 7, weight=0.5))


def test_streams_between_layers_too_in_any_layout(folder: Path, run_ranks) -> None:
    options = options_for(folder, lm_loss_weight=0.3, layer_loss=LayerLossOptions(LAYER_PAIRS, "mse", weight=3.0))
    (one,) = run_ranks(distill_run, 1, student_run(folder, "layers-1", model=LAYER_MODEL), options)
    for name, layout in {"tp2": {"tensor": 2, "recompute": "full"}, "tp2-sp": {"tensor": 2, "sequence_parallel": True}}.items():
        run = student_run(folder, f"layers-{name}", model=LAYER_MODEL, parallel=layout)
        for _, metrics in run_ranks(distill_run, 2, run, options):
            for step, expected in zip(metrics, one[1], strict=True):
                assert step == pytest.approx(expected, rel=1e-5)
    for step in one[1]:
        assert step["loss"] == pytest.approx(step["kl"] + 0.3 * step["lm_loss"] + 3.0 * step["layers"], rel=1e-5)
    assert 0 < one[1][-1]["layers"] < one[1][0]["layers"]


@pytest.mark.parametrize(
    ("options", "changes", "pipeline", "message"),
    [
        (LayerLossOptions((LayerPair(5, 0),)), {}, 1, "a layer loss names layer 5 of the student, which has layers 0 to 4"),
        (LayerLossOptions((LayerPair(0, 8),)), {}, 1, "a layer loss names layer 8 of the teacher, which has layers 0 to 7"),
        (LayerLossOptions(()), {}, 1, "without pairs of layers"),
        (LayerLossOptions((LayerPair(0, 0, weight=0.0),)), {}, 1, "must be above 0, got 0.0"),
        (LayerLossOptions(LAYER_PAIRS, weight=-1.0), {}, 1, "must be above 0, got -1.0"),
        (LayerLossOptions(LAYER_PAIRS), {"hidden_size": 64}, 1, "the teacher's is 80 wide and the student's 64"),
        (LayerLossOptions(LAYER_PAIRS), {}, 2, "needs parallel.pipeline=1, got 2: losses are made on the last stage"),
    ],
)
def test_layers_that_cannot_be_compared(options: LayerLossOptions, changes: dict, pipeline: int, message: str) -> None:
    student, teacher = (ModelConfig(**MODEL | model) for model in (LAYER_MODEL | changes, TEACHER))
    with pytest.raises(ValueError, match=message):
        check_layer_losses(options, student, teacher, ParallelConfig(pipeline=pipeline))


def test_a_student_with_its_teachers_weights_has_nothing_to_learn(folder: Path, run_ranks) -> None:
    options = options_for(folder)
    run = student_run(folder, "oneself", model=TEACHER, checkpoint={"initialize_from": options.teacher})
    ((outcome, metrics),) = run_ranks(distill_run, 1, run, options)
    assert abs(metrics[0]["loss"]) < 1e-6


def test_resume_is_bitwise_and_another_teacher_is_refused(folder: Path, run_ranks) -> None:
    options = options_for(folder, layer_loss=LayerLossOptions((LayerPair(1, 1),), "cosine", 0.5))
    ((whole, _),) = run_ranks(distill_run, 1, student_run(folder, "whole", model=LAYER_MODEL), options)
    stopped = student_run(folder, "stopped", model=LAYER_MODEL, train={"exit_after_steps": 2})
    ((first, _),) = run_ranks(distill_run, 1, stopped, options)
    assert len(first.losses) == 2
    ((rest, _),) = run_ranks(distill_run, 1, student_run(folder, "stopped", model=LAYER_MODEL), options)
    assert first.losses + rest.losses == whole.losses
    assert all(torch.equal(rest.weights[name], tensor) for name, tensor in whole.weights.items())
    other = replace(options, temperature=2.0, layer_loss=LayerLossOptions((LayerPair(1, 2),), "cosine", 0.5))
    (message,) = run_ranks(raised_by, 1, distill_run, student_run(folder, "stopped", model=LAYER_MODEL), other)
    assert "distillation.temperature was 1.0, is 2.0" in message
    assert "distillation.layer_loss.pairs[0].teacher was 1, is 2" in message


def test_teachers_that_do_not_fit(folder: Path, run_ranks) -> None:
    other_vocabulary = student_run(folder, "bad", model={**STUDENT, "vocab_size": 300})
    (message,) = run_ranks(raised_by, 1, distill_run, other_vocabulary, options_for(folder))
    assert "predicts 250 tokens (padded: 256), the student 300 (padded: 384)" in message
    (message,) = run_ranks(raised_by, 1, distill_run, student_run(folder, "bad"), options_for(folder, hidden_loss_weight=1.0))
    assert "the teacher's are 80 wide and the student's 64" in message
    pairs = LayerLossOptions((LayerPair(0, 8),))
    (message,) = run_ranks(raised_by, 1, distill_run, student_run(folder, "bad", model=LAYER_MODEL), options_for(folder, layer_loss=pairs))
    assert "names layer 8 of the teacher" in message


def test_bf16_and_float8(folder: Path, run_ranks) -> None:
    bf16 = {"precision": "bf16", "micro_batch_size": 2}
    fp8 = {"recipe": "delayed", "delayed": {"history_length": 4}}
    model = {**STUDENT, "ffn_hidden_size": 96}
    ((_, exact),) = run_ranks(distill_run, 1, student_run(folder, "exact", model=model), options_for(folder))
    for name, sections in (("bf16", {"train": bf16}), ("fp8", {"train": bf16, "fp8": fp8})):
        ((_, metrics),) = run_ranks(distill_run, 1, student_run(folder, name, model=model, **sections), options_for(folder))
        np.testing.assert_allclose([step["loss"] for step in metrics], [step["loss"] for step in exact], rtol=0.05)
