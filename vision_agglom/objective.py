"""The loss of one micro-batch: every teacher's terms, how they are balanced, and MESA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hybrid.train.task import Metrics
from vision_agglom import losses
from vision_agglom.average import AveragedStudent
from vision_agglom.balance import AdaLoss, uncertainty_weighted
from vision_agglom.config.schema import VisionConfig, loss_terms
from vision_agglom.contract import TeacherFeatures
from vision_agglom.geometry import cut_window
from vision_agglom.heads import TeacherHeads, give_zero_gradients
from vision_agglom.reading import VisionMicroBatch
from vision_agglom.students.vit import BackboneFeatures
from vision_agglom.targets.tracker import TargetTracker
from vision_agglom.tokens import View, match_grids


@dataclass(frozen=True)
class TeacherAnswer:
    """What a teacher said, and of which window."""

    features: TeacherFeatures
    view: View


class Objective:
    """The loss of a run.

    Args:
        run: the run.
        trackers: every teacher's targets.
        device: where the losses are.
    """

    def __init__(self, run: VisionConfig, trackers: Mapping[str, TargetTracker], device: torch.device) -> None:
        self.run, self.trackers = run, trackers
        self.terms = loss_terms(run)
        self.metric_names = ("loss", *self.terms, *(("mesa",) if run.loss.mesa.weight else ()))
        self.adaloss = AdaLoss(self.terms, run.loss.adaloss_momentum, device) if run.loss.balance == "adaloss" else None
        self.average: AveragedStudent | None = None
        """MESA's teacher, once the student is built."""

    def __call__(
        self,
        heads: TeacherHeads,
        student: BackboneFeatures,
        student_view: View,
        answers: Mapping[str, TeacherAnswer],
        micro: VisionMicroBatch,
    ) -> tuple[Tensor, Metrics]:
        """The images' weighted losses, summed, and every term as (sum, images)."""
        total_B: Tensor | float = 0.0
        absent = heads.parameters_without(answers)
        patches_BTD = give_zero_gradients(student.patches_BTD, absent)
        metrics = {name: torch.zeros(2, device=patches_BTD.device) for name in self.metric_names}
        for name, answer in answers.items():
            for kind, loss_B in self._teacher_terms(name, heads, student, patches_BTD, student_view, answer):
                term = f"{name}.{kind}"
                metrics[term] = _metric(loss_B)
                weighed_B = self._balanced(term, loss_B, heads, is_training=micro.is_training)
                total_B = total_B + getattr(self.run.teacher(name), f"{kind}_weight") * weighed_B
        if self.average is not None and micro.is_training and micro.step >= self.run.loss.mesa.start_step:
            loss_B = self._mesa(self.average, student, student_view, micro)
            metrics["mesa"] = _metric(loss_B)
            total_B = total_B + self.run.loss.mesa.weight * loss_B
        total_B = total_B * micro.part.partition.weight
        metrics["loss"] = _metric(total_B)
        return total_B.sum(), metrics

    def _teacher_terms(
        self,
        name: str,
        heads: TeacherHeads,
        student: BackboneFeatures,
        patches_BTD: Tensor,
        student_view: View,
        answer: TeacherAnswer,
    ) -> Iterator[tuple[str, Tensor]]:
        """("spatial" or "summary", loss [B]) of one teacher."""
        options, tracker, features = self.run.teacher(name), self.trackers[name], answer.features
        target_BTC = tracker.transformation.normalize(features.spatial_BTC)
        matched = match_grids(heads.spatial[name](patches_BTD, tracker.turn), student_view, target_BTC, answer.view)
        if options.spatial_loss == "mse":
            yield "spatial", losses.spatial_mse(matched.student_BTC, matched.teacher_BTC, matched.mask_BT)
        else:
            beta = self.run.loss.smooth_l1_beta
            yield "spatial", losses.spatial_cosine_smooth_l1(matched.student_BTC, matched.teacher_BTC, beta, matched.mask_BT)
        if options.summary_loss != "none":
            token_BD = student.prefix_BSD[:, self.run.teacher_names.index(name)]
            summary_BC = heads.summary[name](token_BD)
            if options.summary_loss == "cosine":
                yield "summary", losses.summary_cosine(summary_BC, features.summary_BC)
            else:
                yield "summary", losses.summary_angle(summary_BC, features.summary_BC, tracker.dispersion)

    def _balanced(self, term: str, loss_B: Tensor, heads: TeacherHeads, *, is_training: bool) -> Tensor:
        if self.adaloss is not None:
            if is_training:
                self.adaloss.observe(term, loss_B)
            return loss_B * self.adaloss.factor(term)
        if heads.log_variances is not None:
            return uncertainty_weighted(loss_B, heads.log_variances[self.terms.index(term)].float())
        return loss_B

    def _mesa(self, average: AveragedStudent, student: BackboneFeatures, student_view: View, micro: VisionMicroBatch) -> Tensor:
        view = micro.view("the average", student.grid, self.run.seed)
        with torch.no_grad():
            theirs_BTD = average.model(cut_window(micro.batch.images_BCHW, view), step=micro.step).patches_BTD
        matched = match_grids(student.patches_BTD.float(), student_view, theirs_BTD.float(), view)
        return losses.mesa(matched.student_BTC, matched.teacher_BTC, matched.mask_BT)


def _metric(loss_B: Tensor) -> Tensor:
    # Filled on the device: a number sent from the host would wait for the device.
    return torch.stack([loss_B.detach().float().sum(), loss_B.new_full((), float(len(loss_B)), dtype=torch.float32)])
