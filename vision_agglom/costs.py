"""What a teacher costs a run, for dividing the ranks: timed on what it will be shown, weighed by how often it will be."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_hybrid.checkpoint.agreement import gather
from vision_agglom.config.schema import VisionConfig
from vision_agglom.panel import TeacherPanel


@dataclass(frozen=True)
class Workload:
    """A micro-batch as a teacher meets it."""

    resolution: int
    """Side of the student's images in pixels."""
    num_images: int


def count_workloads(run: VisionConfig, name: str) -> Counter[Workload]:
    """How many images of the whole run come to a teacher in which micro-batches; where resolutions are drawn, their expected share."""
    images: Counter[Workload] = Counter()
    for stage in run.stages:
        for part in stage.partitions:
            if name in run.teachers_of(part):
                for resolution in part.resolutions:
                    share = part.turns(stage.steps) * part.batch_size / len(part.resolutions)
                    images[Workload(resolution, part.micro_batch_size)] += share
    return images


def measure_cost(run: VisionConfig, panel: TeacherPanel, name: str) -> float:
    """A teacher's seconds per image of the run, the slowest rank's, the same on all ranks. Collective over all ranks.

    Args:
        panel: has the teacher on every rank that computes the loss, on none elsewhere; its duties are not set.
    """
    own = time_teacher(run, panel, name) if name in panel.teachers else 0.0
    return max(gather(own, panel.substrate.control_group))


def time_teacher(run: VisionConfig, panel: TeacherPanel, name: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """A teacher's seconds per image of the run on this rank. Images that it is not shown count and cost nothing.

    Each kind of micro-batch goes the whole way twice, resized and laid out as a mosaic where the run does so; the second pass counts.
    """
    workloads = count_workloads(run, name)
    seconds = sum(images * _time_image(panel, name, workload, run.student.patch_size, clock) for workload, images in workloads.items())
    return seconds / run.total_samples


def _time_image(panel: TeacherPanel, name: str, workload: Workload, student_patch_size: int, clock: Callable[[], float]) -> float:
    device, side = panel.substrate.device, workload.resolution
    images_BCHW = torch.zeros(workload.num_images, 3, side, side, device=device)
    start_s = 0.0
    for _ in range(2):
        _wait(device)
        start_s = clock()
        panel.describe({name: images_BCHW}, side // student_patch_size)
        _wait(device)
    return (clock() - start_s) / workload.num_images


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
