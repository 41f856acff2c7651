"""Loading a run's teachers, checking that they take what they will be shown, and dividing them over the ranks.

Where ranks divide the teachers none holds them all at any time: a set that fits only when it is divided can start.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping

import torch

from megatron_hybrid.checkpoint.agreement import failing_together, gather
from megatron_hybrid.substrate.context import Substrate
from vision_agglom.config.distill import DistilledTeacherConfig
from vision_agglom.config.schema import VisionConfig
from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.contract import Teacher, TeacherFacts
from vision_agglom.costs import measure_cost
from vision_agglom.panel import TeacherPanel, plan_showing
from vision_agglom.partition import Duty, plan_teacher_ranks

LoadTeacher = Callable[[TeacherConfig, torch.device, torch.dtype], Teacher]


def muster_teachers(run: VisionConfig, substrate: Substrate, load: LoadTeacher) -> TeacherPanel:
    """Load the teachers where the loss is computed, each rank its own; their facts are known on every rank. Collective over all ranks.

    Raises:
        ValueError: a teacher cannot be loaded, has no summary where one is to be learned, or takes no images of a side it will be shown.
    """
    dtype = _dtype(run)
    duties: list[tuple[Duty, ...]] | None = None
    own = set(run.teacher_names)
    if run.train.teacher_ranks == "partitioned" and substrate.data_size > 1:
        costs = run.train.teacher_costs or _measure_one_at_a_time(run, substrate, load, dtype)
        duties = plan_teacher_ranks(costs, substrate.data_size)
        own = {duty.teacher for duty in duties[substrate.data_rank]}
    teachers = _load([teacher for teacher in run.teachers if teacher.name in own], substrate, load, dtype)
    facts = _gather_facts(run, teachers, substrate)
    check_facts(run, facts)
    return TeacherPanel(run.teachers, facts, teachers, substrate, duties, dtype)


def _load(specs: Iterable[DistilledTeacherConfig], substrate: Substrate, load: LoadTeacher, dtype: torch.dtype) -> dict[str, Teacher]:
    """These teachers on a rank that computes the loss, none on others; what fails on one rank fails on all. Collective."""
    with failing_together(substrate.control_group):
        if substrate.pipeline_rank < substrate.pipeline_size - 1:
            return {}
        return {spec.name: load(spec, substrate.device, dtype) for spec in specs}


def _gather_facts(run: VisionConfig, teachers: dict[str, Teacher], substrate: Substrate) -> dict[str, TeacherFacts]:
    """What any rank knows of the teachers it loaded, in the run's order. Collective."""
    known: dict[str, TeacherFacts] = {}
    for of_rank in gather({name: teacher.facts for name, teacher in teachers.items()}, substrate.control_group):
        known |= of_rank
    return {name: known[name] for name in run.teacher_names if name in known}


def _dtype(run: VisionConfig) -> torch.dtype:
    return torch.bfloat16 if run.train.teacher_precision == "bf16" else torch.float32


def check_facts(run: VisionConfig, facts: Mapping[str, TeacherFacts]) -> None:
    """Refuse a run whose teachers cannot do what it asks of them; of all teachers, or of those that ``facts`` has.

    Raises:
        ValueError: a teacher has no summary where one is to be learned, or takes no images of a side that it will be shown.
    """
    for name, fact in facts.items():
        if fact.summary_channels is None and run.teacher(name).summary_loss != "none":
            raise ValueError(f"teacher {name!r} has no summary; set its summary_loss=none")
    for stage in run.stages:
        for part in stage.partitions:
            for name in (name for name in facts if name in run.teachers_of(part)):
                for resolution in part.resolutions:
                    plan_showing(run.teacher(name), facts[name], resolution // run.student.patch_size)


def load_facts(run: VisionConfig, load: LoadTeacher) -> dict[str, TeacherFacts]:
    """Facts of a run's teachers, each of them loaded on the CPU, asked and let go again.

    Raises:
        ValueError: a teacher cannot be loaded.
    """
    facts: dict[str, TeacherFacts] = {}
    for spec in run.teachers:
        facts[spec.name] = load(spec, torch.device("cpu"), _dtype(run)).facts
        _collect()
    return facts


def _collect() -> None:
    """Let a dropped teacher go now: a library's model may refer to itself, and the collector may come after the next one is loaded."""
    gc.collect()


def _measure_one_at_a_time(run: VisionConfig, substrate: Substrate, load: LoadTeacher, dtype: torch.dtype) -> dict[str, float]:
    """Each teacher's seconds per image of the run. Every rank loads one teacher, times it and frees it before the next. Collective."""
    costs: dict[str, float] = {}
    for spec in run.teachers:
        teachers = _load([spec], substrate, load, dtype)
        facts = _gather_facts(run, teachers, substrate)
        check_facts(run, facts)
        costs[spec.name] = measure_cost(run, TeacherPanel([spec], facts, teachers, substrate, None, dtype), spec.name)
        teachers.clear()
        _collect()
        if substrate.device.type == "cuda":
            torch.cuda.empty_cache()
    return costs
