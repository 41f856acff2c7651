"""A distillation run. Every field says what it is; nothing here imports torch."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_hybrid.config.schema import (
    CheckpointConfig,
    Fp8Config,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RuntimeConfig,
    Section,
)
from vision_agglom.config.distill import DistilledTeacherConfig, HeadConfig, LossConfig, StatisticsConfig
from vision_agglom.config.evaluation import TEXT_LIBRARIES, EvaluationConfig
from vision_agglom.config.images import ImagesConfig
from vision_agglom.config.schedule import PartitionConfig, StageConfig
from vision_agglom.config.student import StudentConfig


class VisionTrainConfig(Section):
    """How a step is computed."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """Working precision. bf16 keeps fp32 masters and moments."""
    teacher_precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of the frozen teachers."""
    exit_after_steps: int | None = Field(None, gt=0)
    """Save and stop after this many steps of this process, without shortening the schedule. Unset: run to the end."""
    teacher_ranks: Literal["all", "partitioned"] = "all"
    """all: every data-parallel rank runs all teachers on its images. partitioned: ranks divide the teachers and exchange features."""
    teacher_costs: dict[str, float] = Field(default_factory=dict)
    """Teacher name -> relative cost per image, for dividing the ranks. Empty: measured at the start."""

    @model_validator(mode="after")
    def _check(self) -> VisionTrainConfig:
        if self.teacher_costs and self.teacher_ranks == "all":
            raise ValueError("teacher_costs is not read with teacher_ranks=all; drop it or choose partitioned")
        if any(cost <= 0 for cost in self.teacher_costs.values()):
            raise ValueError(f"teacher_costs={self.teacher_costs} must be positive")
        return self


class VisionValidationConfig(Section):
    """The loss on held-out images, by source."""

    sources: dict[str, ImagesConfig] = Field(default_factory=dict)
    """Name -> images. Empty: no validation."""
    every_steps: int = Field(100, gt=0)
    """Steps between validations; one more runs at the end."""
    num_batches: int = Field(4, gt=0)
    """Steps' worth of images per source and validation, the same ones each time."""


class VisionConfig(Section):
    """One distillation run."""

    run_dir: Path
    """Where the run keeps its resolved configuration, metrics, checkpoints and pictures."""
    seed: int = Field(1234, ge=0, lt=2**63)
    """Seed of the initial weights, of crops of the position embedding, of resolutions, windows and shifts."""
    student: StudentConfig
    teachers: tuple[DistilledTeacherConfig, ...] = Field(min_length=1)
    """The teachers, in the order of their class tokens."""
    heads: HeadConfig = HeadConfig()
    images: ImagesConfig
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """What is trained when, in order."""
    statistics: StatisticsConfig = StatisticsConfig()
    loss: LossConfig = LossConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig
    train: VisionTrainConfig = VisionTrainConfig()
    fp8: Fp8Config = Fp8Config()
    """Float8 products in the blocks' linears."""
    validation: VisionValidationConfig = VisionValidationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(teacher.name for teacher in self.teachers)

    def teachers_of(self, partition: PartitionConfig) -> tuple[str, ...]:
        """Names of the teachers that see a partition's images: all where it names none."""
        return partition.teachers or self.teacher_names

    def teacher(self, name: str) -> DistilledTeacherConfig:
        """The teacher of this name."""
        (found,) = (teacher for teacher in self.teachers if teacher.name == name)
        return found

    @property
    def evaluation_resolution(self) -> int:
        """Side at which the student is measured."""
        return self.evaluation.resolution or self.stages[-1].partitions[0].resolutions[0]

    @property
    def evaluation_resolutions(self) -> tuple[int, ...]:
        """Sides of the curves over resolution, ascending, the one it is measured at among them."""
        given = self.evaluation.resolutions or tuple(
            side for stage in self.stages for partition in stage.partitions for side in partition.resolutions
        )
        return tuple(sorted({*given, self.evaluation_resolution}))

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens before the patches."""
        return len(self.teachers) + self.student.num_register_tokens(len(self.teachers))

    @property
    def tokens_per_sample(self) -> int:
        """What the trainer counts as progress: one per image."""
        return 1

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(stage.steps for stage in self.stages)

    @property
    def total_samples(self) -> int:
        """Images of the whole run."""
        return self.samples_before(self.total_steps)

    @property
    def first_steps(self) -> tuple[int, ...]:
        """The step that each stage begins with, and at the end the number of all."""
        return (0, *accumulate(stage.steps for stage in self.stages))

    def samples_before(self, step: int) -> int:
        """Images that the first ``step`` steps take."""
        return sum(stage.samples_before(min(max(step - first, 0), stage.steps)) for stage, first in zip(self.stages, self.first_steps))

    def step_at(self, samples: int) -> int:
        """The step that begins after so many images.

        Raises:
            ValueError: no step begins there, which is to say that the stages have been changed.
        """
        step = bisect_left(range(self.total_steps), samples, key=self.samples_before)
        if self.samples_before(step) != samples:
            raise ValueError(
                f"no step begins after {samples} images (one begins after {self.samples_before(step)}): stages that are already trained "
                "were changed; restore their steps, batch sizes and rates, or start a new run_dir"
            )
        return step

    def steps_left(self, samples: int) -> int:
        """Optimizer steps from a number of images to the end of the run."""
        return self.total_steps - self.step_at(samples)

    def check_data_ranks(self, data_size: int) -> None:
        """Refuse data-parallel ranks that some partition's batch does not divide over.

        Raises:
            ValueError: the message names the partition.
        """
        for index, stage in enumerate(self.stages):
            for number, partition in enumerate(stage.partitions):
                _check_batch(partition, f"stages.{index}.partitions.{number}", self.parallel, data_size)

    def check_evaluation(self) -> None:
        """Refuse a run that can be trained and exported, but not evaluated. For whoever is going to evaluate: export needs none of it.

        Raises:
            ValueError: the teacher of ``evaluation.zero_shot`` learns no summary or has no text tower.
        """
        options = self.evaluation.zero_shot
        if options is None:
            return
        where = f"evaluation.zero_shot.teacher={options.teacher}"
        learned = [teacher.name for teacher in self.teachers if teacher.summary_loss != "none"]
        if options.teacher not in learned:
            raise ValueError(f"{where}: expected one whose summary is learned, of {learned}")
        teacher = self.teacher(options.teacher)
        if teacher.library not in TEXT_LIBRARIES:
            raise ValueError(f"{where}: library={teacher.library} has no text towers; name a teacher of {' or '.join(TEXT_LIBRARIES)}")
        if not teacher.pretrained and options.text_model is None:
            raise ValueError(
                f"{where} has pretrained=false, and a twin comes without a text tower; give evaluation.zero_shot.text_model, or drop "
                "zero_shot"
            )

    def architecture(self) -> dict[str, Any]:
        """What the configuration says of the weights; the teachers' widths come with the teachers."""
        return self.student.architecture() | {"teachers": list(self.teacher_names), "num_prefix_tokens": self.num_prefix_tokens}

    @model_validator(mode="after")
    def _check(self) -> VisionConfig:
        if self.run_dir == Path():
            raise ValueError("run_dir is empty; name a directory of the run's own")
        _check_names(self.teacher_names)
        for index, stage in enumerate(self.stages):
            for number, partition in enumerate(stage.partitions):
                where = f"stages.{index}.partitions.{number}"
                unknown = sorted(set(partition.teachers or ()) - set(self.teacher_names))
                if unknown:
                    raise ValueError(f"{where}.teachers names {unknown}; the teachers are {list(self.teacher_names)}")
                for resolution in partition.resolutions:
                    _check_resolution(resolution, where, self.student)
        if self.loss.smooth_l1_beta != 1.0 and all(teacher.spatial_loss == "mse" for teacher in self.teachers):
            raise ValueError(f"loss.smooth_l1_beta={self.loss.smooth_l1_beta} is not read: no teacher has spatial_loss=cosine_smooth_l1")
        unknown = sorted(set(self.train.teacher_costs) - set(self.teacher_names))
        if unknown:
            raise ValueError(f"train.teacher_costs names {unknown}; the teachers are {list(self.teacher_names)}")
        if self.train.teacher_costs and len(self.train.teacher_costs) < len(self.teachers):
            raise ValueError("train.teacher_costs must give every teacher's cost, or none")
        for resolution in (*self.evaluation.resolutions, self.evaluation_resolution):
            _check_resolution(resolution, "evaluation", self.student)
        self._check_layout()
        return self

    def _check_layout(self) -> None:
        student, tensor = self.student, self.parallel.tensor
        for name, size in (
            ("student.num_attention_heads", student.num_attention_heads),
            ("student.ffn_hidden_size", student.ffn_hidden_size),
        ):
            if size % tensor:
                raise ValueError(f"{name}={size} does not divide by parallel.tensor={tensor}; change one of them")
        block_ranges(student.num_layers, self.parallel)
        if self.parallel.overlap_param_gather and (student.spectral_reparam or self.loss.mesa.weight):
            raise ValueError(
                "parallel.overlap_param_gather leaves the weights incomplete between steps, where student.spectral_reparam and loss.mesa "
                "read them; switch it off"
            )
        for name in ("telemetry_every_steps", "shadow_every_steps"):
            if getattr(self.fp8, name) is not None:
                raise ValueError(f"fp8.{name} is not read here: float8 reports are those of language models; drop it")
        if self.loss.mesa.weight and self.parallel.pipeline > 1:
            raise ValueError("loss.mesa runs the averaged student in one piece; set parallel.pipeline=1 or loss.mesa.weight=0")


def block_ranges(num_layers: int, parallel: ParallelConfig) -> list[tuple[int, int]]:
    """Blocks (first, end) of each virtual stage, in model order; the first stages take a remainder.

    Raises:
        ValueError: the stages do not cover the blocks, or there are more stages than blocks.
    """
    num_stages = parallel.pipeline * parallel.virtual_pipeline
    if num_stages > num_layers:
        raise ValueError(f"student.num_layers={num_layers} are fewer than parallel.pipeline x virtual_pipeline={num_stages} stages")
    sizes = list(parallel.stages or [num_layers // num_stages + (index < num_layers % num_stages) for index in range(num_stages)])
    if len(sizes) != num_stages or sum(sizes) != num_layers or min(sizes) < 1:
        raise ValueError(f"parallel.stages={sizes} must be {num_stages} positive numbers that add up to student.num_layers={num_layers}")
    ends = [sum(sizes[: index + 1]) for index in range(num_stages)]
    return list(zip([0, *ends], ends))


def _check_batch(partition: PartitionConfig, where: str, parallel: ParallelConfig, data_size: int) -> None:
    per_pass = partition.micro_batch_size * data_size
    if partition.batch_size % per_pass:
        raise ValueError(
            f"{where}.batch_size={partition.batch_size} does not divide by micro_batch_size={partition.micro_batch_size} x "
            f"{data_size} data-parallel rank(s) = {per_pass}; make it a multiple of {per_pass}, or start other ranks"
        )
    passes = partition.batch_size // per_pass
    if parallel.virtual_pipeline > 1 and passes % parallel.pipeline:
        raise ValueError(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} interleaves micro-batches in rounds of parallel.pipeline="
            f"{parallel.pipeline}, but {where} has {passes} per rank and step; make its batch_size a multiple of "
            f"{per_pass * parallel.pipeline}"
        )


def loss_terms(run: VisionConfig) -> tuple[str, ...]:
    """Every term of the loss that belongs to a teacher: "NAME.spatial" and, where it is learned, "NAME.summary"."""
    return tuple(
        f"{teacher.name}.{kind}"
        for teacher in run.teachers
        for kind in (("spatial",) if teacher.summary_loss == "none" else ("spatial", "summary"))
    )


def _check_names(names: tuple[str, ...]) -> None:
    """Readers of exported heads look keys up by prefix, so no name may begin with another."""
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            if name == other:
                raise ValueError(f"two teachers are called {name!r}; give each a name of its own")
            if name.startswith(other) or other.startswith(name):
                raise ValueError(
                    f"teachers {name!r} and {other!r}: one name begins with the other, and readers of exported heads could not tell them "
                    "apart; rename one"
                )


def check_image_side(side: int, name: str, student: StudentConfig) -> None:
    """Refuse images that the student takes at no time.

    Args:
        side: in pixels.
        name: what the message calls it.

    Raises:
        ValueError: the patch does not divide the side, or it exceeds the student's largest.
    """
    patch = student.patch_size
    if side <= 0 or side % patch:
        lower, upper = side // patch * patch, -(-side // patch) * patch
        choice = f"{lower} or {upper}" if lower > 0 else f"{max(upper, patch)}"
        raise ValueError(f"{name}: {side} is no multiple of student.patch_size={patch}; choose {choice}")
    if side > student.max_image_size:
        raise ValueError(f"{name}: {side} exceeds student.max_image_size={student.max_image_size}; raise that or choose a smaller one")


def _check_resolution(resolution: int, where: str, student: StudentConfig) -> None:
    check_image_side(resolution, f"{where}.resolutions", student)
    side = resolution // student.patch_size
    if student.windows.sizes and not any(side % size == 0 for size in student.windows.sizes):
        raise ValueError(
            f"{where}.resolutions: {resolution} has {side} patches a side, which none of student.windows.sizes="
            f"{list(student.windows.sizes)} divides; add a size or change the resolution"
        )
