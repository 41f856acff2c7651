"""Multi-teacher distillation as a task of the one Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hybrid.checkpoint.agreement import failing_together, gather
from megatron_hybrid.checkpoint.sharding import shard_copies, shard_parameters
from megatron_hybrid.data.hashing import sample_hashes
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.train.task import LossFunction, Metrics, StepData
from vision_agglom import losses
from vision_agglom.average import AveragedStudent
from vision_agglom.balance import AdaLoss, uncertainty_weighted
from vision_agglom.config.images import ImagesConfig
from vision_agglom.config.schema import VisionConfig, loss_terms
from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.contract import ImageBatch, Teacher, TeacherFacts, TeacherFeatures
from vision_agglom.flops import training_flops_per_image
from vision_agglom.geometry import canvas_side, cut_window, draw_view
from vision_agglom.heads import HeadShape, TeacherHeads, give_zero_gradients
from vision_agglom.images.stream import ImageStream
from vision_agglom.panel import TeacherPanel, divide_ranks, measure_costs, plan_showing
from vision_agglom.partition import PartPlan, RunPlan, StepPlan
from vision_agglom.students.build import build_student_chunks, length_multiple, update_spectral
from vision_agglom.students.layers import CutLinear
from vision_agglom.students.pretrained import load_pretrained
from vision_agglom.students.sequence import ImageSequence
from vision_agglom.students.vit import BackboneFeatures, StudentModel
from vision_agglom.targets.tracker import TargetTracker
from vision_agglom.tokens import View, match_grids

OpenStream = Callable[..., ImageStream]
LoadTeacher = Callable[[TeacherConfig, torch.device, torch.dtype], Teacher]


@dataclass(frozen=True)
class VisionMicroBatch:
    """Images of one forward pass, and what the step has in mind for them."""

    batch: ImageBatch
    part: PartPlan
    step: int
    is_training: bool
    observes: bool
    """Whether the teachers' features count towards the statistics."""

    @cached_property
    def samples(self) -> np.ndarray:
        """Global sample indices on the host, fetched once."""
        return self.batch.sample_indices_B.cpu().numpy()


class Distillation:
    """Trains a student on several teachers' features (a ``train.task.StatefulTask``).

    Args:
        run: the run.
        config: megatron-core's settings of this rank.
        substrate: where this rank stands.
        load: loads one teacher.
        open_stream: opens a stream of images; takes ``ImageStream``'s arguments.

    Raises:
        ValueError: a teacher, its view or its standardizer does not fit the run, or a batch does not divide over the ranks.
    """

    # Resolutions, and the teachers that a step shows its images to, change from one micro-batch to the next.
    is_capturable = False

    def __init__(
        self,
        run: VisionConfig,
        config: TransformerConfig,
        substrate: Substrate,
        *,
        load: LoadTeacher,
        open_stream: OpenStream = ImageStream,
    ) -> None:
        self.run, self.config, self.substrate, self.open_stream = run, config, substrate, open_stream
        self.plan = RunPlan(run)
        self.is_last_stage = substrate.pipeline_rank == substrate.pipeline_size - 1
        self.chunks: list[StudentModel] = []
        self.facts, teachers = self._load_teachers(load)
        self._check_views()
        duties, teachers = self._divide(teachers)
        dtype = torch.bfloat16 if run.train.teacher_precision == "bf16" else torch.float32
        self.panel = TeacherPanel(run.teachers, self.facts, teachers, substrate, duties, dtype)
        self.trackers: dict[str, TargetTracker] = {}
        if self.is_last_stage:
            self.trackers = {
                teacher.name: TargetTracker(teacher, self.facts[teacher.name], run.statistics, substrate) for teacher in run.teachers
            }
        self.terms = loss_terms(run)
        self.metric_names = ("loss", *self.terms, *(("mesa",) if run.loss.mesa.weight else ()))
        self.adaloss = AdaLoss(self.terms, run.loss.adaloss_momentum, substrate.device) if run.loss.balance == "adaloss" else None
        self.average: AveragedStudent | None = None
        largest = max(run.stages[0].partitions, key=lambda part: part.batch_size)
        self.micro_batch_shape = (self._sequence(largest.resolutions[0]).padded_length, largest.micro_batch_size)
        self.flops_per_sample = self._mean_flops()
        self.images_fingerprint = self._open(run.images, self.plan.streams(0)[0], 0).fingerprint()

    def build_chunks(self) -> list[StudentModel]:
        """This rank's parts of the student."""
        self.chunks = build_student_chunks(self.run, self.head_shapes(), self.config, self.substrate)
        if self.run.student.initialize_from is not None:
            load_pretrained(self.chunks, self.run, self.substrate)
        if self.run.loss.mesa.weight:
            (second,) = build_student_chunks(self.run, self.head_shapes(), self.config, self.substrate)
            self.average = AveragedStudent(second, self.run.loss.mesa.momentum)
        return self.chunks

    def head_shapes(self) -> list[HeadShape]:
        """The heads of every teacher."""
        facts = [self.facts[name] for name in self.run.teacher_names]
        widths = [self.run.student.hidden_size, *(fact.spatial_channels for fact in facts), *(fact.summary_channels or 0 for fact in facts)]
        hidden_size = self.run.heads.hidden_size or max(widths)
        return [
            HeadShape(
                teacher.name,
                None if teacher.summary_loss == "none" else self.facts[teacher.name].summary_channels,
                self.facts[teacher.name].spatial_channels,
                hidden_size,
                self.run.heads.num_inner,
            )
            for teacher in self.run.teachers
        ]

    def training_data(self, first_sample: int) -> Iterator[StepData]:
        """The run's steps from a global number of images on."""
        step = self.run.step_at(first_sample)
        if self.average is not None and not self.average.is_started:
            self.average.start(self.chunks[0])
        stage = None
        with ExitStack() as open_streams:
            streams: dict[int, ImageStream] = {}
            while step < self.run.total_steps:
                step_plan = self.plan.plan(step)
                if step_plan.stage != stage:
                    open_streams.close()
                    stage = step_plan.stage
                    if step_plan.stage_step == 0:
                        self._prime(stage, step)
                    streams = {
                        stream: open_streams.enter_context(closing(self._open(self.run.images, stream, step)))
                        for stream in self.plan.streams(stage)
                    }
                yield self._read_step(step_plan, streams)
                step += 1

    def validation_data(self) -> Mapping[str, Callable[[], Iterator[StepData]]]:
        """Each validation source from its beginning, framed and batched as the last stage's first partition."""
        return {name: partial(self._read_validation, images) for name, images in self.run.validation.sources.items()}

    def forward_step(
        self, micro_batches: Iterator[VisionMicroBatch], chunk: StudentModel | DistributedDataParallel
    ) -> tuple[Tensor, LossFunction | None]:
        """Run one chunk over the next micro-batch; on the last stage, the sum of the images' losses."""
        micro = next(micro_batches)
        canvases_BCHW, student_view = micro.batch.images_BCHW, self._view("the student", self._student_grid(micro.part), micro)
        output = chunk(
            cut_window(canvases_BCHW, student_view),
            samples=micro.samples if micro.is_training else None,
            step=micro.step,
            window=micro.part.window if micro.is_training else None,
        )
        if not isinstance(output, BackboneFeatures):
            return output, None
        model = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
        teachers, views = self._ask_teachers(micro)
        if micro.observes:
            for name, features in teachers.items():
                self.trackers[name].observe(features)
        loss_sum, metrics = self._loss(model, output, student_view, teachers, views, micro)
        return loss_sum, partial(_describe_loss, len(canvases_BCHW), metrics)

    def finish_step(self) -> None:
        """Bring statistics, running means, the averaged student and singular vectors up to date."""
        for tracker in self.trackers.values():
            tracker.finish_step()
        if self.adaloss is not None and self.is_last_stage:
            self.adaloss.finish_step(self.substrate.data_group)
        update_spectral(self.chunks)
        if self.average is not None:
            self.average.follow(self.chunks[0])

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """Statistics, running means, singular vectors, the averaged student."""
        substrate = self.substrate
        copies = shard_copies(dict(self._named_state()), substrate.tensor_group, substrate.data_group, differ_by_data_rank=False)
        if self.average is None:
            return copies
        weights = ((f"average.{name}", weight) for name, weight in self.average.weights.items())
        return copies | shard_parameters(weights, substrate.tensor_group, substrate.data_group)

    @torch.no_grad()
    def take_state(self, loaded: dict[str, Tensor]) -> None:
        """Take all of it over."""
        for name, tensor in self._named_state():
            tensor.copy_(loaded[name].view_as(tensor))
        for tracker in self.trackers.values():
            tracker.take_loaded()
        if self.average is not None:
            for name, weight in self.average.weights.items():
                weight.copy_(loaded[f"average.{name}"])
            self.average.load_model()
            self.average.is_started = True

    def architecture(self) -> dict[str, Any]:
        """The student's shape and its heads'."""
        heads = {
            shape.name: [shape.summary_channels, shape.spatial_channels, shape.hidden_size, shape.num_inner] for shape in self.head_shapes()
        }
        return self.run.architecture() | {"heads": heads, "balance": self.run.loss.balance == "uncertainty"}

    def data_fingerprint(self) -> dict[str, Any]:
        """What decides the samples and the targets."""
        teachers = {
            teacher.name: {
                "model": f"{teacher.library}:{teacher.model}:{teacher.weights}:{teacher.seed}:{teacher.output_scale}",
                "view": teacher.view,
                "standardizer": teacher.standardizer,
                "spatial_channels": self.facts[teacher.name].spatial_channels,
                "summary_channels": self.facts[teacher.name].summary_channels,
            }
            for teacher in self.run.teachers
        }
        return {"images": self.images_fingerprint, "teachers": teachers, "statistics": self.run.statistics.model_dump(mode="json")}

    def check_fingerprint(self, saved: dict[str, Any]) -> None:
        """Refuse other images, teachers or targets, naming what differs."""
        there, here = dict(_flatten(saved)), dict(_flatten(self.data_fingerprint()))
        differences = [
            f"{name} is {there.get(name, '(not set)')!r} there and {here.get(name, '(not set)')!r} here"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]
        if differences:
            raise ValueError(
                f"the checkpoint was trained towards other targets: {'; '.join(differences)}; restore these options, or start a new run "
                "from its weights (checkpoint.initialize_from)"
            )

    def _load_teachers(self, load: LoadTeacher) -> tuple[dict[str, TeacherFacts], dict[str, Teacher]]:
        """Facts of all teachers on every rank; the teachers themselves where the loss is computed."""
        dtype = torch.bfloat16 if self.run.train.teacher_precision == "bf16" else torch.float32
        teachers: dict[str, Teacher] = {}
        with failing_together(self.substrate.control_group):
            if self.is_last_stage:
                teachers = {teacher.name: load(teacher, self.substrate.device, dtype) for teacher in self.run.teachers}
        all_facts = gather({name: teacher.facts for name, teacher in teachers.items()}, self.substrate.control_group)
        facts = next(of_rank for of_rank in all_facts if of_rank)
        for teacher in self.run.teachers:
            if facts[teacher.name].summary_channels is None and teacher.summary_loss != "none":
                raise ValueError(f"teacher {teacher.name!r} has no summary; set its summary_loss=none")
        return facts, teachers

    def _check_views(self) -> None:
        for stage in self.run.stages:
            for part in stage.partitions:
                for name in part.teachers or self.run.teacher_names:
                    for resolution in part.resolutions:
                        plan_showing(self.run.teacher(name), self.facts[name], resolution // self.run.student.patch_size)

    def _divide(self, teachers: dict[str, Teacher]) -> tuple[list | None, dict[str, Teacher]]:
        """Duties of the data ranks, and the teachers that this one keeps."""
        train = self.run.train
        if train.teacher_ranks == "all" or self.substrate.data_size == 1:
            return None, teachers
        costs: Mapping[str, float] = train.teacher_costs
        if not costs:
            side = self.run.stages[0].partitions[0].resolutions[0] // self.run.student.patch_size
            sides = {name: plan_showing(self.run.teacher(name), fact, side).side for name, fact in self.facts.items()}
            sides |= {name: fact.resolution for name, fact in self.facts.items() if self.run.teacher(name).view == "mosaic"}
            costs = measure_costs(teachers, sides, self.substrate)
        duties = divide_ranks(costs, self.substrate)
        own = {duty.teacher for duty in duties[self.substrate.data_rank]}
        return duties, {name: teacher for name, teacher in teachers.items() if name in own}

    def _open(self, images: ImagesConfig, stream: int, step: int) -> ImageStream:
        """A partition's images from a step of its stage on."""
        student, shift = self.run.student, self.run.loss.shift_patches
        return self.open_stream(
            images,
            resolution=lambda sample: canvas_side(self.plan.part_at(stream, sample).resolution, student.patch_size, shift),
            data_rank=self.substrate.data_rank,
            data_size=self.substrate.data_size,
            micro_batch=self.plan.part_at(stream, self.plan.first_sample(stream, step)).partition.micro_batch_size,
            first_sample=self.plan.first_sample(stream, step),
            device=self.substrate.device,
        )

    def _read_step(self, step_plan: StepPlan, streams: dict[int, ImageStream]) -> StepData:
        micro_batches = [
            VisionMicroBatch(batch, part, step_plan.step, is_training=True, observes=step_plan.stage_step > 0)
            for part in step_plan.parts
            for batch in self._read_part(part, streams[part.stream])
        ]
        return StepData(micro_batches, step_plan.num_samples, _hash(micro_batches))

    def _read_part(self, part: PartPlan, stream: ImageStream) -> list[ImageBatch]:
        partition = part.partition
        count = partition.batch_size // (partition.micro_batch_size * self.substrate.data_size)
        return [next(stream) for _ in range(count)]

    def _read_validation(self, images: ImagesConfig) -> Iterator[StepData]:
        stream = self.plan.streams(len(self.run.stages) - 1)[0]
        step = self.run.total_steps - self.run.stages[-1].steps
        part = self.plan.part_at(stream, self.plan.first_sample(stream, step))
        with closing(self._open(images, stream, step)) as source:
            for _ in range(self.run.validation.num_batches):
                batches = self._read_part(part, source)
                micro_batches = []
                for batch in batches:
                    now = self.plan.part_at(stream, int(batch.sample_indices_B[0]))
                    micro_batches.append(VisionMicroBatch(batch, now, 0, is_training=False, observes=False))
                yield StepData(micro_batches, part.partition.batch_size, _hash(micro_batches))

    def _prime(self, stage: int, step: int) -> None:
        """Begin a stage's statistics with the first batch of each of its partitions, before training on them."""
        if not self.is_last_stage:
            return
        for tracker in self.trackers.values():
            tracker.begin_stage()
        seen: list[tuple[str, TeacherFeatures]] = []
        for stream in self.plan.streams(stage):
            part = self.plan.part_at(stream, self.plan.first_sample(stream, step))
            with closing(self._open(self.run.images, stream, step)) as source:
                for batch in self._read_part(part, source):
                    micro = VisionMicroBatch(batch, part, step, is_training=True, observes=True)
                    teachers, _ = self._ask_teachers(micro)
                    for name, features in teachers.items():
                        self.trackers[name].observe(features)
                        seen.append((name, TeacherFeatures(features.summary_BC, features.spatial_BTC[:, :0], features.grid)))
        for tracker in self.trackers.values():
            tracker.finish_step(is_primer=True)
        for name, features in seen:
            self.trackers[name].observe_angles(features)
        for tracker in self.trackers.values():
            tracker.finish_angles()

    def _ask_teachers(self, micro: VisionMicroBatch) -> tuple[dict[str, TeacherFeatures], dict[str, View]]:
        """Features of the partition's teachers, and the windows that they saw."""
        side = micro.part.resolution // self.run.student.patch_size
        names = micro.part.partition.teachers or self.run.teacher_names
        views = {name: self._view(name, self.panel.showing(name, side).grid, micro) for name in names}
        windows = {name: cut_window(micro.batch.images_BCHW, view) for name, view in views.items()}
        return self.panel.describe(windows, side), views

    def _loss(
        self,
        model: StudentModel,
        student: BackboneFeatures,
        student_view: View,
        teachers: Mapping[str, TeacherFeatures],
        views: Mapping[str, View],
        micro: VisionMicroBatch,
    ) -> tuple[Tensor, Metrics]:
        """The images' weighted losses, summed, and every term as (sum, images)."""
        heads, total_B = model.heads, 0.0
        absent = heads.parameters_without(teachers)
        patches_BTD = give_zero_gradients(student.patches_BTD, absent)
        metrics = {name: torch.zeros(2, device=patches_BTD.device) for name in self.metric_names}
        for name, features in teachers.items():
            for kind, loss_B in self._teacher_terms(name, heads, student, patches_BTD, student_view, features, views[name]):
                term = f"{name}.{kind}"
                metrics[term] = _metric(loss_B)
                weighed_B = self._balanced(term, loss_B, heads, is_training=micro.is_training)
                total_B = total_B + getattr(self.run.teacher(name), f"{kind}_weight") * weighed_B
        if self.average is not None and micro.is_training and micro.step >= self.run.loss.mesa.start_step:
            loss_B = self._mesa(student, student_view, micro)
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
        features: TeacherFeatures,
        view: View,
    ) -> Iterator[tuple[str, Tensor]]:
        """("spatial" or "summary", loss [B]) of one teacher."""
        options, tracker = self.run.teacher(name), self.trackers[name]
        target_BTC = tracker.transformation.normalize(features.spatial_BTC)
        matched = match_grids(heads.spatial[name](patches_BTD, tracker.turn), student_view, target_BTC, view)
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

    @torch.no_grad()
    def _averaged_features(self, view: View, micro: VisionMicroBatch) -> BackboneFeatures:
        assert self.average is not None
        return self.average.model(cut_window(micro.batch.images_BCHW, view), step=micro.step)

    def _mesa(self, student: BackboneFeatures, student_view: View, micro: VisionMicroBatch) -> Tensor:
        view = self._view("the average", student.grid, micro)
        average = self._averaged_features(view, micro)
        matched = match_grids(student.patches_BTD.float(), student_view, average.patches_BTD.float(), view)
        return losses.mesa(matched.student_BTC, matched.teacher_BTC, matched.mask_BT)

    def _view(self, name: str, grid: tuple[int, int], micro: VisionMicroBatch) -> View:
        resolution = micro.part.resolution
        return draw_view(grid, resolution, micro.batch.resolution, micro.samples, seed=self.run.seed, step=micro.step, name=name)

    def _student_grid(self, part: PartPlan) -> tuple[int, int]:
        side = part.resolution // self.run.student.patch_size
        return side, side

    def _sequence(self, resolution: int) -> ImageSequence:
        side = resolution // self.run.student.patch_size
        return ImageSequence(self.run.num_prefix_tokens, (side, side), length_multiple(self.run))

    def _mean_flops(self) -> float:
        """Training FLOPs of the student for one image, averaged over the run; teachers are not counted."""
        weighed = [
            (stage.steps * part.rate * part.batch_size / len(part.resolutions), self._sequence(resolution))
            for stage in self.run.stages
            for part in stage.partitions
            for resolution in part.resolutions
        ]
        flops = (weight * training_flops_per_image(self.run.student, sequence.length, self.head_shapes()) for weight, sequence in weighed)
        return sum(flops) / sum(weight for weight, _ in weighed)

    def _named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that all tensor and data ranks of a stage hold alike."""
        for name, tracker in self.trackers.items():
            for key, tensor in tracker.named_tensors():
                yield f"targets.{name}.{key}", tensor
        if self.adaloss is not None and self.is_last_stage:
            yield "adaloss", self.adaloss.means_2T
        for chunk in self.chunks:
            for name, module in chunk.named_modules():
                if isinstance(module, CutLinear) and module.spectral is not None:
                    for side in ("left_KO", "right_KI"):
                        yield f"spectral.{chunk.global_name(name)}.{side[:-3]}", getattr(module.spectral, side)


def _metric(loss_B: Tensor) -> Tensor:
    return torch.stack([loss_B.detach().float().sum(), loss_B.new_tensor(float(len(loss_B)), dtype=torch.float32)])


def _describe_loss(num_images: int, metrics: Metrics, loss_sum: Tensor) -> tuple[Tensor, Tensor, Metrics]:
    """The schedule's (sum, count, metrics)."""
    return loss_sum, torch.tensor(num_images, dtype=torch.int32, device=loss_sum.device), metrics


def _hash(micro_batches: list[VisionMicroBatch]) -> int:
    """This rank's share of a step's hash: of the samples and of the resolution of each."""
    total = 0
    for micro in micro_batches:
        resolutions = np.full((len(micro.samples), 1), micro.batch.resolution)
        total += int(sample_hashes(micro.samples, resolutions).sum(dtype=np.uint64))
    # As an int64, which all ranks' shares are summed in.
    total &= (1 << 64) - 1
    return total - (1 << 64) if total >= 1 << 63 else total


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value
