"""Loading a run's teachers, checking that they take what they will be shown, and dividing them over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from megatron_hybrid.checkpoint.agreement import failing_together, gather
from megatron_hybrid.substrate.context import Substrate
from vision_agglom.config.schema import VisionConfig
from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.contract import Teacher, TeacherFacts
from vision_agglom.panel import TeacherPanel, divide_ranks, measure_costs, plan_showing
from vision_agglom.partition import Duty

LoadTeacher = Callable[[TeacherConfig, torch.device, torch.dtype], Teacher]


def muster_teachers(run: VisionConfig, substrate: Substrate, load: LoadTeacher) -> TeacherPanel:
    """Load the teachers where the loss is computed; their facts are known on every rank. Collective over all ranks.

    Raises:
        ValueError: a teacher cannot be loaded, has no summary where one is to be learned, or takes no images of a side it will be shown.
    """
    dtype = _dtype(run)
    teachers: dict[str, Teacher] = {}
    with failing_together(substrate.control_group):
        if substrate.pipeline_rank == substrate.pipeline_size - 1:
            teachers = {teacher.name: load(teacher, substrate.device, dtype) for teacher in run.teachers}
    all_facts = gather({name: teacher.facts for name, teacher in teachers.items()}, substrate.control_group)
    facts = next(of_rank for of_rank in all_facts if of_rank)
    check_facts(run, facts)
    duties = _divide(run, facts, teachers, substrate)
    if duties is not None:
        own = {duty.teacher for duty in duties[substrate.data_rank]}
        teachers = {name: teacher for name, teacher in teachers.items() if name in own}
    return TeacherPanel(run.teachers, facts, teachers, substrate, duties, dtype)


def load_facts(run: VisionConfig, load: LoadTeacher) -> dict[str, TeacherFacts]:
    """Facts of a run's teachers, each of them loaded on the CPU, asked and let go again.

    Raises:
        ValueError: a teacher cannot be loaded.
    """
    return {teacher.name: load(teacher, torch.device("cpu"), _dtype(run)).facts for teacher in run.teachers}


def _dtype(run: VisionConfig) -> torch.dtype:
    return torch.bfloat16 if run.train.teacher_precision == "bf16" else torch.float32


def check_facts(run: VisionConfig, facts: Mapping[str, TeacherFacts]) -> None:
    """Refuse a run whose teachers cannot do what it asks of them.

    Raises:
        ValueError: a teacher has no summary where one is to be learned, or takes no images of a side that it will be shown.
    """
    for teacher in run.teachers:
        if facts[teacher.name].summary_channels is None and teacher.summary_loss != "none":
            raise ValueError(f"teacher {teacher.name!r} has no summary; set its summary_loss=none")
    for stage in run.stages:
        for part in stage.partitions:
            for name in part.teachers or run.teacher_names:
                for resolution in part.resolutions:
                    plan_showing(run.teacher(name), facts[name], resolution // run.student.patch_size)


def _divide(
    run: VisionConfig, facts: Mapping[str, TeacherFacts], teachers: Mapping[str, Teacher], substrate: Substrate
) -> list[tuple[Duty, ...]] | None:
    """Duties of the data ranks; None where every rank runs all teachers."""
    if run.train.teacher_ranks == "all" or substrate.data_size == 1:
        return None
    costs: Mapping[str, float] = run.train.teacher_costs
    if not costs:
        side = run.stages[0].partitions[0].resolutions[0] // run.student.patch_size
        sides = {name: plan_showing(run.teacher(name), fact, side).side for name, fact in facts.items()}
        sides |= {name: fact.resolution for name, fact in facts.items() if run.teacher(name).view == "mosaic"}
        costs = measure_costs(teachers, sides, substrate)
    return divide_ranks(costs, substrate)
