"""The teachers of a run at work: what each is shown, and which rank runs which."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from megatron_hybrid.checkpoint.agreement import gather
from megatron_hybrid.substrate.context import Substrate
from vision_agglom.config.distill import DistilledTeacherConfig
from vision_agglom.contract import Teacher, TeacherFacts, TeacherFeatures
from vision_agglom.images.mosaic import MosaicTeacher
from vision_agglom.partition import Duty

_FILL = 0.5
"""Grey, for what a mosaic leaves empty, where a teacher does not say which colour becomes zero for it."""


@dataclass(frozen=True)
class Showing:
    """What a teacher is shown for a student's grid."""

    side: int
    """Of the images in pixels."""
    grid: tuple[int, int]
    """Of the features it gives."""


def plan_showing(teacher: DistilledTeacherConfig, facts: TeacherFacts, student_side: int) -> Showing:
    """What a teacher is shown when the student has ``student_side`` patches a side.

    Raises:
        ValueError: the teacher takes no images of that side.
    """
    if teacher.view == "own":
        side = facts.resolution
    else:
        side = student_side * facts.patch_size
        if teacher.view == "match" and facts.fixed_resolution and side != facts.resolution:
            raise ValueError(
                f"teacher {teacher.name!r} takes images of {facts.resolution} pixels only, and for {student_side} patches a side, as the "
                f"student has, it would need {side}; use view=own (resized images) or view=mosaic"
            )
        if teacher.view == "mosaic" and side > facts.resolution:
            raise ValueError(
                f"teacher {teacher.name!r}: an image of {side} pixels, to match a student with {student_side} patches a side, does not fit "
                f"its mosaic of {facts.resolution}; use view=own, or a lower resolution"
            )
    if side % facts.patch_size:
        raise ValueError(
            f"teacher {teacher.name!r}: {side} pixels are no multiple of its patch of {facts.patch_size}; give it another resolution"
        )
    return Showing(side, (side // facts.patch_size, side // facts.patch_size))


class TeacherPanel:
    """Runs teachers on this rank's images.

    Args:
        options: the run's teachers, in order.
        facts: of every teacher, known on all ranks.
        teachers: those that this rank has loaded; all of them unless duties divide them.
        substrate: where this rank stands.
        duties: of each data rank, when ranks divide the teachers; None when every rank runs all.
    """

    def __init__(
        self,
        options: Sequence[DistilledTeacherConfig],
        facts: Mapping[str, TeacherFacts],
        teachers: Mapping[str, Teacher],
        substrate: Substrate,
        duties: list[tuple[Duty, ...]] | None,
        dtype: torch.dtype,
    ) -> None:
        self.options = {teacher.name: teacher for teacher in options}
        self.facts, self.teachers, self.substrate, self.duties, self.dtype = facts, teachers, substrate, duties, dtype

    def showing(self, name: str, student_side: int) -> Showing:
        """What one teacher is shown for a student's grid."""
        return plan_showing(self.options[name], self.facts[name], student_side)

    @torch.no_grad()
    def describe(self, windows: Mapping[str, Tensor], student_side: int) -> dict[str, TeacherFeatures]:
        """Features of each named teacher for this rank's images. Collective over the data ranks where these divide the teachers.

        Args:
            windows: teacher -> images [B, 3, H, W] of the window that it sees, at the student's scale.
            student_side: the student's patches a side.
        """
        if self.duties is None:
            return {name: self._run(name, images_BCHW, student_side) for name, images_BCHW in windows.items()}
        return {name: self._exchange(name, images_BCHW, student_side) for name, images_BCHW in windows.items()}

    def _run(self, name: str, images_BCHW: Tensor, student_side: int) -> TeacherFeatures:
        showing, teacher = self.showing(name, student_side), self.teachers[name]
        images_BCHW = resize_images(images_BCHW, showing.side)
        if self.options[name].view == "mosaic":
            fill_C = getattr(teacher, "mean_C", images_BCHW.new_full((3,), _FILL))
            teacher = MosaicTeacher(teacher, showing.side, fill_C)
        features = teacher(images_BCHW)
        if features.grid != showing.grid:
            raise ValueError(
                f"teacher {name!r} gave a grid of {features.grid} for images of {showing.side} pixels; expected {showing.grid} from its "
                f"patch size of {self.facts[name].patch_size}"
            )
        return TeacherFeatures(features.summary_BC, features.spatial_BTC.to(self.dtype), features.grid)

    def _exchange(self, name: str, images_BCHW: Tensor, student_side: int) -> TeacherFeatures:
        """Images go to the ranks that run the teacher, features come back: two all-to-alls over the data ranks."""
        group, batch = self.substrate.data_group, len(images_BCHW)
        size, rank = group.size(), group.rank()
        owners = self._owners(name, batch, size)
        sent = [len(_overlap(owner, _own(rank, batch))) for owner in owners]
        mine = owners[rank]
        received = [len(_overlap(mine, _own(source, batch))) for source in range(size)]
        gathered_NCHW = images_BCHW.new_empty(len(mine), *images_BCHW.shape[1:])
        distributed.all_to_all_single(gathered_NCHW, _ordered(images_BCHW, owners, rank, batch), received, sent, group=group)
        facts, showing = self.facts[name], self.showing(name, student_side)
        patches, channels = showing.grid[0] * showing.grid[1], facts.spatial_channels
        summary_channels = 0 if self.options[name].view == "mosaic" else facts.summary_channels or 0
        width = patches * channels + summary_channels
        packed_NW = images_BCHW.new_empty(0, width, dtype=self.dtype)
        if len(mine):
            # Images on one canvas see each other: a mosaic has the images of one micro-batch, whoever composes it.
            passes = gathered_NCHW.split(batch) if self.options[name].view == "mosaic" else (gathered_NCHW,)
            packed_NW = torch.cat([self._pack(self._run(name, images, student_side)) for images in passes])
        returned_BW = packed_NW.new_empty(batch, width)
        distributed.all_to_all_single(returned_BW, packed_NW, sent, received, group=group)
        spatial_BTC = returned_BW[:, : patches * channels].unflatten(1, (patches, channels))
        summary_BC = returned_BW[:, patches * channels :] if summary_channels else None
        return TeacherFeatures(summary_BC, spatial_BTC, showing.grid)

    def _pack(self, features: TeacherFeatures) -> Tensor:
        """Spatial features and summary of each image in one row."""
        parts = [features.spatial_BTC.flatten(1)]
        if features.summary_BC is not None:
            parts.append(features.summary_BC.to(self.dtype))
        return torch.cat(parts, 1)

    def _owners(self, name: str, batch: int, size: int) -> list[range]:
        """Which of the group's images each rank describes with this teacher; of a mosaic's, whole micro-batches."""
        assert self.duties is not None
        unit = batch if self.options[name].view == "mosaic" else 1
        ranges = []
        for duties in self.duties:
            of_teacher = [duty.images(batch * size // unit) for duty in duties if duty.teacher == name]
            units = of_teacher[0] if of_teacher else range(0)
            ranges.append(range(units.start * unit, units.stop * unit))
        return ranges


def resize_images(images_BCHW: Tensor, side: int) -> Tensor:
    """Bilinear resize with antialiasing to a square."""
    if images_BCHW.shape[2:] == (side, side):
        return images_BCHW
    return F.interpolate(images_BCHW, (side, side), mode="bilinear", antialias=True, align_corners=False)


def measure_costs(teachers: Mapping[str, Teacher], shapes: Mapping[str, int], substrate: Substrate, batch: int = 1) -> dict[str, float]:
    """Seconds per image of each teacher, the slowest rank's, the same on all ranks: the second of two passes. Collective over all ranks.

    Args:
        teachers: the same ones on every rank that computes the loss; none elsewhere.
        shapes: teacher -> side of the images.
        batch: images per pass.
    """
    own: dict[str, float] = {}
    for name, teacher in teachers.items():
        images = torch.zeros(batch, 3, shapes[name], shapes[name], device=substrate.device)
        for _ in range(2):
            _wait(substrate.device)
            start_s = time.perf_counter()
            teacher(images)
            _wait(substrate.device)
            own[name] = (time.perf_counter() - start_s) / batch
    reports = gather(own, substrate.control_group)
    return {name: max(report.get(name, 0.0) for report in reports) for name in shapes}


def _own(rank: int, batch: int) -> range:
    return range(rank * batch, (rank + 1) * batch)


def _overlap(first: range, second: range) -> range:
    return range(max(first.start, second.start), max(min(first.stop, second.stop), max(first.start, second.start)))


def _ordered(images_BCHW: Tensor, owners: list[range], rank: int, batch: int) -> Tensor:
    """This rank's images in the order of the ranks that describe them."""
    own = _own(rank, batch)
    places = [index - own.start for owner in owners for index in _overlap(owner, own)]
    return images_BCHW[places].contiguous()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
