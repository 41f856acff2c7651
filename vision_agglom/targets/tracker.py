"""One teacher's statistics over a run, and the targets they make.

Statistics are gathered during the first steps of each stage. What a step sees is merged over all ranks when the step ends, so that all
micro-batches of a step, on whatever rank, have the same targets. Before a stage's first step the same images are looked at once without
training.

The head keeps to the space of its first targets for the whole run. Later statistics turn its output into the space of the present ones
(``turn``): they change the metric in which its error is measured, and not what it says of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from megatron_hybrid.substrate.context import Substrate
from vision_agglom.config.distill import DistilledTeacherConfig, StatisticsConfig
from vision_agglom.contract import TeacherFacts, TeacherFeatures
from vision_agglom.losses import angle
from vision_agglom.targets.standardizers import Transformation, Turn, check_standardizer, make_transformation
from vision_agglom.targets.statistics import Moments


class TargetTracker:
    """Statistics and normalisation of one teacher. Collective methods are for the ranks that compute the loss.

    Raises:
        ValueError: at construction, when the standardizer does not fit the teacher's channels.
    """

    def __init__(self, teacher: DistilledTeacherConfig, facts: TeacherFacts, options: StatisticsConfig, substrate: Substrate) -> None:
        self.teacher, self.options, self.substrate = teacher, options, substrate
        channels, device = facts.spatial_channels, substrate.device
        try:
            check_standardizer(teacher.standardizer, channels)
        except ValueError as error:
            raise ValueError(f"teacher {teacher.name!r}: {error}") from None
        self.moments, self._pending = Moments.empty(channels, device), Moments.empty(channels, device)
        self.transformation = Transformation.identity(channels, device)
        """Of the present targets."""
        self.head_space = Transformation.identity(channels, device)
        """Of the first ones, in whose space the spatial head's own output is."""
        self._has_head_space = torch.zeros(1, dtype=torch.int64, device=device)
        self.turn: Turn | None = None
        """From the head's space to the present targets'; None while they are the same."""
        summary = facts.summary_channels or 1
        self._summary_sum_C = torch.zeros(summary, dtype=torch.float64, device=device)
        self._pending_sum_C = torch.zeros_like(self._summary_sum_C)
        # Sum of squared angles to the mean direction, and their number.
        self._angles_2 = torch.zeros(2, dtype=torch.float64, device=device)
        self._pending_angles_2 = torch.zeros_like(self._angles_2)
        # On the device for checkpoints, and on the host for decisions that should not wait for the device.
        self._saved_steps = torch.zeros(1, dtype=torch.int64, device=device)
        self._num_steps = 0

    @property
    def dispersion(self) -> Tensor:
        """Mean squared angle of the summaries to their mean direction so far, fp32; 1 where nothing was seen."""
        squares, count = self._angles_2
        return torch.where(count > 0, squares / count.clamp(min=1), torch.ones_like(squares)).clamp(min=1e-6).float()

    @property
    def is_frozen(self) -> bool:
        """Whether the stage's statistics are complete."""
        return self._num_steps >= self.options.steps

    def begin_stage(self) -> None:
        """Forget the statistics: another stage's resolutions have others."""
        self.moments.clear()
        for tensor in (self._summary_sum_C, self._angles_2, self._saved_steps):
            tensor.zero_()
        self._num_steps = 0

    @torch.no_grad()
    def observe(self, features: TeacherFeatures) -> None:
        """Count what the teacher said of this rank's images, unless frozen."""
        if self.is_frozen:
            return
        if self.teacher.standardizer != "none":
            self._pending.merge(Moments.of(features.spatial_BTC.flatten(0, 1)))
        if self.teacher.summary_loss == "angle":
            summary_BC = features.summary_BC.double()
            self._pending_sum_C += summary_BC.sum(0)
            if bool(self._summary_sum_C.any()):
                self._count_angles(summary_BC)

    @torch.no_grad()
    def observe_angles(self, features: TeacherFeatures) -> None:
        """Count angles to the mean direction for images that were observed before there was one."""
        if self.teacher.summary_loss == "angle":
            self._count_angles(features.summary_BC.double())

    @torch.no_grad()
    def finish_step(self, *, is_primer: bool = False) -> None:
        """Merge what all ranks observed since the last call, and make new targets if it is time. Collective over the data ranks."""
        if self.is_frozen:
            return
        group = self.substrate.data_group
        if self.teacher.standardizer != "none":
            self.moments.merge(self._pending.merged_over(group))
        for total, pending in ((self._summary_sum_C, self._pending_sum_C), (self._angles_2, self._pending_angles_2)):
            distributed.all_reduce(pending, group=group)
            total += pending
        self._forget_pending()
        self._num_steps += 1
        self._saved_steps.fill_(self._num_steps)
        if is_primer or self._num_steps % self.options.refresh_steps == 0 or self.is_frozen:
            self._refresh()

    @torch.no_grad()
    def finish_angles(self) -> None:
        """Merge the angles alone, after ``observe_angles``. Collective over the data ranks."""
        distributed.all_reduce(self._pending_angles_2, group=self.substrate.data_group)
        self._angles_2 += self._pending_angles_2
        self._forget_pending()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that a checkpoint holds, the same on all tensor and data ranks; loading writes into these."""
        yield "count", self.moments.count
        yield "mean", self.moments.mean_C
        yield "scatter", self.moments.scatter_CC
        for space, transformation in (("targets", self.transformation), ("head", self.head_space)):
            yield f"{space}.forward", transformation.forward_CC
            yield f"{space}.inverse", transformation.inverse_CC
            yield f"{space}.offset", transformation.mean_C
        yield "head.is_set", self._has_head_space
        yield "summary_sum", self._summary_sum_C
        yield "angles", self._angles_2
        yield "observed_steps", self._saved_steps

    def take_loaded(self) -> None:
        """Follow the tensors after a checkpoint was read into them."""
        self._num_steps = int(self._saved_steps)
        self.turn = Turn.between(self.head_space, self.transformation)

    def _refresh(self) -> None:
        if self.teacher.standardizer != "none" and not bool(self.moments.count):
            # No partition of this stage shows the teacher anything.
            return
        transformation = make_transformation(self.teacher.standardizer, self.moments, eps=self.options.eps)
        tensors = [transformation.forward_CC.contiguous(), transformation.inverse_CC.contiguous(), transformation.mean_C.contiguous()]
        for tensor in tensors:
            # Eigenvectors of close eigenvalues hang on rounding; one rank decides.
            for group in (self.substrate.data_group, self.substrate.tensor_group):
                distributed.broadcast(tensor, group_src=0, group=group)
        self.transformation = Transformation(*tensors)
        if not bool(self._has_head_space):
            self.head_space = Transformation(*(tensor.clone() for tensor in tensors))
            self._has_head_space.fill_(1)
        self.turn = Turn.between(self.head_space, self.transformation)

    def _count_angles(self, summary_BC: Tensor) -> None:
        mean_C = F.normalize(self._summary_sum_C, dim=0)
        squares_B = angle(summary_BC.float(), mean_C.float().expand_as(summary_BC)).double().square()
        self._pending_angles_2 += torch.stack([squares_B.sum(), squares_B.new_full((), float(len(squares_B)))])

    def _forget_pending(self) -> None:
        self._pending.clear()
        self._pending_sum_C.zero_()
        self._pending_angles_2.zero_()
