"""The loss of a micro-batch: a head that says what the teacher says costs nothing, whatever the statistics became since it learned that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_hybrid.substrate.groups import initialize, shutdown
from tests.vision_agglom.small import FACTS, small_vision_run, synthetic_image
from vision_agglom.config.schema import VisionConfig
from vision_agglom.contract import ImageBatch, TeacherFeatures
from vision_agglom.heads import HeadShape, Linear, TeacherHeads
from vision_agglom.objective import Objective, TeacherAnswer
from vision_agglom.partition import RunPlan
from vision_agglom.reading import VisionMicroBatch
from vision_agglom.students.build import build_transformer_config
from vision_agglom.students.ops import vision_ops
from vision_agglom.students.vit import BackboneFeatures
from vision_agglom.targets.tracker import TargetTracker

WIDTH, CHANNELS, BATCH = 32, FACTS["clip"].spatial_channels, 2


def losses_of_a_perfect_head(run: VisionConfig, kind: str) -> dict[str, float]:
    """The teacher's features are a linear map of the student's tokens, and the head is that map in the space of its first targets."""
    substrate = initialize(run)
    config = build_transformer_config(run, substrate)
    ops = vision_ops(substrate.device, config.params_dtype)
    torch.manual_seed(0)
    truth = torch.randn(CHANNELS, WIDTH)
    tokens = torch.randn(BATCH, 16, WIDTH)
    features = TeacherFeatures(torch.ones(BATCH, 12), tokens @ truth.T, (4, 4))
    teacher = run.teachers[0].model_copy(update={"standardizer": kind, "summary_loss": "none"})
    run = run.model_copy(update={"teachers": (teacher, *run.teachers[1:])})
    tracker = TargetTracker(teacher, FACTS["clip"], run.statistics, substrate)
    objective = Objective(run, {"clip": tracker}, substrate.device)
    heads = TeacherHeads([HeadShape(name, None, CHANNELS, 8, 0) for name in ("clip", "dino")], WIDTH, config, ops)
    heads.spatial["clip"] = Linear(WIDTH, CHANNELS, config, ops)
    for parameter in heads.spatial["dino"].parameters():
        torch.nn.init.ones_(parameter)

    def observe(rows: torch.Tensor) -> None:
        tracker.begin_stage()
        tracker.observe(TeacherFeatures(None, rows, (4, 4)))
        tracker.finish_step(is_primer=True)

    observe(torch.randn(20, 16, WIDTH) @ truth.T)
    first = tracker.head_space
    with torch.no_grad():
        heads.spatial["clip"].weight.copy_(first.forward_CC.float() @ truth)
        heads.spatial["clip"].bias.copy_((-first.forward_CC @ first.mean_C).float())
    images = torch.stack([synthetic_image(index, 32) for index in range(BATCH)])
    part = RunPlan(run).plan(0).parts[0]
    micro = VisionMicroBatch(ImageBatch(images, torch.arange(BATCH), 32), part, 0, is_training=True, observes=False)
    student = BackboneFeatures(torch.zeros(BATCH, 4, WIDTH), tokens.requires_grad_(), (4, 4))
    view = micro.view("the student", (4, 4), run.seed)
    found = {}
    for name, scale in (("same statistics", None), ("other statistics", torch.linspace(0.2, 5.0, WIDTH))):
        if scale is not None:
            observe(torch.randn(20, 16, WIDTH) * scale @ truth.T + 3.0)
        loss, metrics = objective(heads, student, view, {"clip": TeacherAnswer(features, view)}, micro)
        found[name] = float(metrics["clip.spatial"][0])
    loss.backward()
    found["gradient of an absent teacher's head"] = max(float(p.grad.abs().max()) for p in heads.spatial["dino"].parameters())
    with torch.no_grad():
        heads.spatial["clip"].bias.add_(1.0)
        found["wrong head"] = float(objective(heads, student, view, {"clip": TeacherAnswer(features, view)}, micro)[1]["clip.spatial"][0])
    shutdown(substrate)
    return found


@pytest.mark.parametrize("kind", ["standardize", "zca", "phi_s"])
def test_a_head_that_is_right_stays_right(kind: str, tmp_path: Path, run_ranks) -> None:
    (found,) = run_ranks(losses_of_a_perfect_head, 1, small_vision_run(tmp_path), kind)
    assert found["same statistics"] < 1e-8 and found["other statistics"] < 1e-8
    assert found["gradient of an absent teacher's head"] == 0.0
    assert found["wrong head"] > 0.01
