"""Multi-teacher distillation as a task of the one Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hybrid.checkpoint.sharding import shard_copies, shard_parameters
from megatron_hybrid.checkpoint.store import complete_steps
from megatron_hybrid.config.run_directory import CHECKPOINTS_NAME
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.train.task import LossFunction, Metrics, StepData
from vision_agglom.average import AveragedStudent
from vision_agglom.config.schema import VisionConfig
from vision_agglom.contract import TeacherFeatures
from vision_agglom.fingerprint import describe_data, describe_new_spaces, require_same, same_teachers
from vision_agglom.flops import training_flops_per_image
from vision_agglom.geometry import cut_window
from vision_agglom.heads import HeadShape
from vision_agglom.images.stream import ImageStream
from vision_agglom.muster import LoadTeacher, muster_teachers
from vision_agglom.objective import Objective, TeacherAnswer
from vision_agglom.partition import RunPlan
from vision_agglom.reading import OpenStream, StepReader, VisionMicroBatch
from vision_agglom.students.build import build_student_chunks, length_multiple, update_spectral
from vision_agglom.students.layers import CutLinear
from vision_agglom.students.pretrained import load_pretrained
from vision_agglom.students.sequence import ImageSequence
from vision_agglom.students.vit import StudentModel
from vision_agglom.targets.tracker import TargetTracker


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
        self.run, self.config, self.substrate = run, config, substrate
        self.plan = RunPlan(run)
        self.reader = StepReader(run, self.plan, substrate, open_stream)
        self.is_last_stage = substrate.pipeline_rank == substrate.pipeline_size - 1
        self.chunks: list[StudentModel] = []
        self.panel = muster_teachers(run, substrate, load)
        self.facts = self.panel.facts
        self.trackers: dict[str, TargetTracker] = {}
        if self.is_last_stage:
            self.trackers = {
                teacher.name: TargetTracker(teacher, self.facts[teacher.name], run.statistics, substrate) for teacher in run.teachers
            }
        self.objective = Objective(run, self.trackers, substrate.device)
        self.metric_names = self.objective.metric_names
        largest = max(run.stages[0].partitions, key=lambda part: part.batch_size)
        self.micro_batch_shape = (self._sequence(largest.resolutions[0]).padded_length, largest.micro_batch_size)
        self.flops_per_sample = self._mean_flops()
        self.images_fingerprint = self.reader.fingerprint()

    @property
    def average(self) -> AveragedStudent | None:
        """The running average of the student that MESA matches."""
        return self.objective.average

    def build_chunks(self) -> list[StudentModel]:
        """This rank's parts of the student."""
        self.chunks = build_student_chunks(self.run, self.head_shapes(), self.config, self.substrate)
        # A run that goes on takes everything from its own checkpoint: the file may have moved since.
        is_new = not complete_steps(self.run.run_dir / CHECKPOINTS_NAME)
        if self.run.student.initialize_from is not None and is_new:
            load_pretrained(self.chunks, self.run, self.substrate)
        if self.run.loss.mesa.weight:
            (second,) = build_student_chunks(self.run, self.head_shapes(), self.config, self.substrate)
            self.objective.average = AveragedStudent(second, self.run.loss.mesa.momentum)
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
        if self.average is not None and not self.average.is_started:
            self.average.start(self.chunks[0])
        return self.reader.training_steps(self.run.step_at(first_sample), self._begin_stage)

    def validation_data(self) -> Mapping[str, Callable[[], Iterator[StepData]]]:
        """Each validation source from its beginning."""
        return {name: partial(self.reader.validation_steps, images) for name, images in self.run.validation.sources.items()}

    def forward_step(
        self, micro_batches: Iterator[VisionMicroBatch], chunk: StudentModel | DistributedDataParallel
    ) -> tuple[Tensor, LossFunction | None]:
        """Run one chunk over the next micro-batch; on the last stage, the sum of the images' losses."""
        micro = next(micro_batches)
        model = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
        # The teachers first: while the device is at work on them the host draws the student's crops.
        answers = self._ask_teachers(micro) if model.post_process else {}
        if micro.observes:
            for name, answer in answers.items():
                self.trackers[name].observe(answer.features)
        side = self._student_side(micro)
        student_view = micro.view("the student", (side, side), self.run.seed)
        output = chunk(
            cut_window(micro.batch.images_BCHW, student_view),
            samples=micro.samples if micro.is_training else None,
            step=micro.step,
            window=micro.part.window if micro.is_training else None,
        )
        if not model.post_process:
            return output, None
        loss_sum, metrics = self.objective(model.heads, output, student_view, answers, micro)
        return loss_sum, partial(_describe_loss, len(micro.samples), metrics)

    def finish_step(self) -> None:
        """Bring statistics, running means, the averaged student and singular vectors up to date."""
        for tracker in self.trackers.values():
            tracker.finish_step()
        if self.objective.adaloss is not None and self.is_last_stage:
            self.objective.adaloss.finish_step(self.substrate.data_group)
        update_spectral(self.chunks)
        if self.average is not None:
            self.average.follow(self.chunks[0])

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """Statistics, running means, singular vectors, the averaged student."""
        copies = self._shard_copies(dict(self._named_state()))
        if self.average is None:
            return copies
        weights = ((f"average.{name}", weight) for name, weight in self.average.weights.items())
        return copies | shard_parameters(weights, self.substrate.tensor_group, self.substrate.data_group)

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

    def weight_state(self, saved_data: dict[str, Any]) -> dict[str, ShardedTensor]:
        """Singular vectors, and the spaces that the heads of the same teachers learned to speak in."""
        own_data = self.data_fingerprint()
        new_spaces = describe_new_spaces(saved_data, own_data)
        if new_spaces is not None and self.substrate.rank == 0:
            print(f"checkpoint.initialize_from={self.run.checkpoint.initialize_from}: {new_spaces}", flush=True)
        heads = tuple(f"targets.{name}.head." for name in same_teachers(saved_data, own_data))
        return self._shard_copies({name: tensor for name, tensor in self._named_state() if name.startswith((*heads, "spectral."))})

    @torch.no_grad()
    def take_weight_state(self, loaded: dict[str, Tensor]) -> None:
        """Take them over: each head says of its teacher what it said in the run that the weights come from."""
        for name, tensor in self._named_state():
            if name in loaded:
                tensor.copy_(loaded[name].view_as(tensor))
        for tracker in self.trackers.values():
            tracker.take_loaded()

    def architecture(self) -> dict[str, Any]:
        """The student's shape and its heads'."""
        heads = {
            shape.name: [shape.summary_channels, shape.spatial_channels, shape.hidden_size, shape.num_inner] for shape in self.head_shapes()
        }
        return self.run.architecture() | {"heads": heads, "balance": self.run.loss.balance == "uncertainty"}

    def data_fingerprint(self) -> dict[str, Any]:
        """What decides the samples and the targets."""
        return describe_data(self.run, self.facts, self.images_fingerprint)

    def check_fingerprint(self, saved: dict[str, Any]) -> None:
        """Refuse other images, teachers or targets, naming what differs."""
        require_same(saved, self.data_fingerprint())

    def _begin_stage(self, stage: int, step: int) -> None:
        """Begin a stage's statistics with the first batch of each of its partitions, before training on them."""
        if not self.is_last_stage:
            return
        for tracker in self.trackers.values():
            tracker.begin_stage()
        seen: list[tuple[str, TeacherFeatures]] = []
        for micro in self.reader.first_micro_batches(stage, step):
            for name, answer in self._ask_teachers(micro).items():
                features = answer.features
                self.trackers[name].observe(features)
                seen.append((name, TeacherFeatures(features.summary_BC, features.spatial_BTC[:, :0], features.grid)))
        for tracker in self.trackers.values():
            tracker.finish_step(is_primer=True)
        for name, features in seen:
            self.trackers[name].observe_angles(features)
        for tracker in self.trackers.values():
            tracker.finish_angles()

    def _ask_teachers(self, micro: VisionMicroBatch) -> dict[str, TeacherAnswer]:
        """What the partition's teachers say of the windows that they see."""
        side = self._student_side(micro)
        names = self.run.teachers_of(micro.part.partition)
        views = {name: micro.view(name, self.panel.showing(name, side).grid, self.run.seed) for name in names}
        windows = {name: cut_window(micro.batch.images_BCHW, view) for name, view in views.items()}
        described = self.panel.describe(windows, side)
        return {name: TeacherAnswer(described[name], views[name]) for name in names}

    def _student_side(self, micro: VisionMicroBatch) -> int:
        return micro.part.resolution // self.run.student.patch_size

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

    def _shard_copies(self, tensors: dict[str, Tensor]) -> dict[str, ShardedTensor]:
        return shard_copies(tensors, self.substrate.tensor_group, self.substrate.data_group, differ_by_data_rank=False)

    def _named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that all tensor and data ranks of a stage hold alike."""
        for name, tracker in self.trackers.items():
            for key, tensor in tracker.named_tensors():
                yield f"targets.{name}.{key}", tensor
        if self.objective.adaloss is not None and self.is_last_stage:
            yield "adaloss", self.objective.adaloss.means_2T
        for chunk in self.chunks:
            for name, module in chunk.named_modules():
                if isinstance(module, CutLinear) and module.spectral is not None:
                    for side in ("left_KO", "right_KI"):
                        yield f"spectral.{chunk.global_name(name)}.{side[:-3]}", getattr(module.spectral, side)


def _describe_loss(num_images: int, metrics: Metrics, loss_sum: Tensor) -> tuple[Tensor, Tensor, Metrics]:
    """The schedule's (sum, count, metrics)."""
    # Filled on the device: a number sent from the host would wait for the device.
    return loss_sum, torch.full((), num_images, dtype=torch.int32, device=loss_sum.device), metrics
