"""A teacher's targets over a run: new statistics change the metric, and not what the head says of the teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_hybrid.substrate.groups import initialize, shutdown
from tests.vision_agglom.small import FACTS, small_vision_run
from vision_agglom.config.schema import VisionConfig
from vision_agglom.contract import TeacherFeatures
from vision_agglom.heads import AdaptorHead
from vision_agglom.students.build import build_transformer_config
from vision_agglom.students.ops import vision_ops
from vision_agglom.targets.standardizers import Transformation
from vision_agglom.targets.tracker import TargetTracker

KINDS = ("none", "global", "standardize", "pca_w", "zca", "hca", "phi_s")
CHANNELS = FACTS["clip"].spatial_channels


def features(seed: int) -> TeacherFeatures:
    """Another seed, another covariance and mean."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(CHANNELS, CHANNELS, generator=generator)
    rows = torch.randn(400, CHANNELS, generator=generator) @ mixing * 3 + torch.randn(CHANNELS, generator=generator)
    return TeacherFeatures(torch.randn(4, 12, generator=generator), rows.view(4, 100, CHANNELS), (10, 10))


def own_space(tracker: TargetTracker, head: AdaptorHead, tokens: torch.Tensor) -> torch.Tensor:
    """What the head says in the teacher's space: its output where the loss is, denormalised by the present targets' statistics."""
    with torch.no_grad():
        return tracker.transformation.denormalize(head(tokens, tracker.turn))


def refit(run: VisionConfig, kind: str) -> dict[str, torch.Tensor]:
    """Two stages of other features under one head."""
    substrate = initialize(run)
    config = build_transformer_config(run, substrate)
    torch.manual_seed(0)
    head = AdaptorHead(32, 24, CHANNELS, 1, config, vision_ops(substrate.device, config.params_dtype))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    teacher = run.teachers[0].model_copy(update={"standardizer": kind, "summary_loss": "cosine"})
    tracker = TargetTracker(teacher, FACTS["clip"], run.statistics, substrate)
    tokens = torch.randn(5, 7, 32)
    outputs: dict[str, torch.Tensor] = {"tokens": tokens}
    for stage in (1, 2):
        tracker.begin_stage()
        tracker.observe(features(stage))
        tracker.finish_step(is_primer=True)
        outputs[f"stage {stage}"] = own_space(tracker, head, tokens)
        outputs[f"targets {stage}"] = tracker.transformation.normalize(features(2).spatial_BTC)
        outputs[f"is turned in {stage}"] = torch.tensor(tracker.turn is not None)
    with torch.no_grad():
        outputs["folded"] = tracker.head_space.denormalize(head(tokens))
        # A checkpoint is read into the tensors that are there.
        resumed = TargetTracker(teacher, FACTS["clip"], run.statistics, substrate)
        for (_, there), (_, here) in zip(tracker.named_tensors(), resumed.named_tensors(), strict=True):
            here.copy_(there)
        resumed.take_loaded()
        outputs["resumed"] = own_space(resumed, head, tokens)
    shutdown(substrate)
    return outputs


@pytest.mark.parametrize("kind", KINDS)
def test_new_statistics_leave_what_the_head_says(kind: str, tmp_path: Path, run_ranks) -> None:
    (outputs,) = run_ranks(refit, 1, small_vision_run(tmp_path), kind)
    before, scale = outputs["stage 1"], outputs["stage 1"].abs().max()
    for name in ("stage 2", "folded", "resumed"):
        assert (outputs[name] - before).abs().max() <= 1e-5 * scale, name
    assert torch.equal(outputs["resumed"], outputs["stage 2"])
    assert not outputs["is turned in 1"] and bool(outputs["is turned in 2"]) == (kind != "none")
    moved = (outputs["targets 2"] - outputs["targets 1"]).abs().max() / outputs["targets 1"].abs().max()
    assert moved > 1e-3 or kind == "none"


def unseen(run: VisionConfig) -> tuple[bool, bool, Transformation]:
    """A stage whose partitions show the teacher nothing, and one that does."""
    substrate = initialize(run)
    tracker = TargetTracker(run.teachers[0].model_copy(update={"summary_loss": "cosine"}), FACTS["clip"], run.statistics, substrate)
    tracker.begin_stage()
    tracker.finish_step(is_primer=True)
    before = bool(tracker._has_head_space)
    tracker.begin_stage()
    tracker.observe(features(1))
    tracker.finish_step(is_primer=True)
    shutdown(substrate)
    return before, tracker.turn is None, tracker.head_space


def test_a_teacher_that_comes_later(tmp_path: Path, run_ranks) -> None:
    """Its head's space is that of the first features, whatever the stage."""
    ((had_space, is_unturned, space),) = run_ranks(unseen, 1, small_vision_run(tmp_path))
    assert not had_space and is_unturned
    assert not torch.equal(space.forward_CC, torch.eye(CHANNELS, dtype=torch.float64))
