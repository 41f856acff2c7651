"""All measures of a trained student: a table, the figures as JSON, curves over resolution, features as colours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.substrate.context import Substrate
from vision_agglom.config.evaluation import ZeroShotConfig
from vision_agglom.config.schema import VisionConfig
from vision_agglom.contract import Teacher, TeacherFeatures
from vision_agglom.evaluate.knn import accuracy, knn_predict
from vision_agglom.evaluate.linear_probe import fit_linear_probe
from vision_agglom.evaluate.matching import MatchStatistics
from vision_agglom.evaluate.mode_switch import ScaleEquivariance
from vision_agglom.evaluate.rankme import RankMe
from vision_agglom.evaluate.segmentation import PatchBatch, class_shares, evaluate_segmentation, fit_segmentation_probe, mean_iou
from vision_agglom.evaluate.zero_shot import embed_classes, load_text_tower, zero_shot_predict
from vision_agglom.images.labelled import LabelledBatch, check_labels, read_labelled
from vision_agglom.images.open_source import open_source
from vision_agglom.panel import TeacherPanel
from vision_agglom.plain.radio import PlainRadio, RadioFeatures
from vision_agglom.tokens import View, match_grids

CONTROL = "(labels)"
"""What the probes find when their features are the labels themselves: where networks are at chance and this is not, it is not the probes.
No teacher can be called so."""

SHOWN_IMAGES = 4
"""Images of the picture of features."""


Describe = Callable[[LabelledBatch], tuple[Tensor, Tensor, tuple[int, int]]]
"""From images to a vector [B, C] and patches [B, rows x columns, C] of each, and the patches' (rows, columns)."""


@dataclass
class Report:
    """What was measured."""

    step: int
    resolution: int
    spatial: dict[str, dict[str, float]] = field(default_factory=dict)
    """Teacher -> figures of ``matching.Match``, in the teacher's own space."""
    summary: dict[str, dict[str, float]] = field(default_factory=dict)
    rankme: dict[str, float] = field(default_factory=dict)
    """Of the student's patches, of each teacher's, and of each head's."""
    curves: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    """Teacher -> side in pixels -> spatial figures there."""
    equivariance: dict[int, float] = field(default_factory=dict)
    """Side -> scale-equivariance error of the student's patches against ``resolution`` (formula: evaluate/mode_switch.py)."""
    probes: dict[str, dict[str, float]] = field(default_factory=dict)
    """Network -> kNN and linear accuracy, mIoU; and of ``CONTROL``."""
    zero_shot: dict[str, float] = field(default_factory=dict)
    """Network -> accuracy by the names of the classes."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Shown:
    """What the picture of features is drawn from."""

    images_BCHW: Tensor
    backbone: tuple[Tensor, tuple[int, int]]
    teachers: dict[str, TeacherFeatures]
    heads: dict[str, TeacherFeatures]


class Evaluation:
    """Measures one student.

    Args:
        run: says what it is measured on.
        radio: the student in plain torch; its heads speak the teachers' own spaces.
        step: of its checkpoint.
        teachers: by name.
        substrate: one rank.

    Raises:
        ValueError: a teacher takes no images of a side asked for, labels are not what probes need, or a text tower cannot be loaded: all
            that can be told before features are computed.
    """

    def __init__(self, run: VisionConfig, radio: PlainRadio, step: int, teachers: Mapping[str, Teacher], substrate: Substrate) -> None:
        self.run, self.radio, self.step, self.substrate = run, radio, step, substrate
        facts = {name: teacher.facts for name, teacher in teachers.items()}
        self.panel = TeacherPanel(run.teachers, facts, teachers, substrate, None, torch.float32)
        for side in run.evaluation_resolutions if run.evaluation.images is not None else (run.evaluation_resolution,):
            for name in run.teacher_names:
                self.panel.showing(name, side // run.student.patch_size)
        for path in (run.evaluation.labelled_train, run.evaluation.labelled_test):
            if path is not None:
                check_labels(open_source(path), path, num_classes=run.evaluation.num_classes, resolution=run.evaluation_resolution)
        options = run.evaluation.zero_shot
        self.classes_KC = None if options is None else self._embed_classes(options)

    def report(self) -> Report:
        """Run every measure that the configuration has images for."""
        report = Report(self.step, self.run.evaluation_resolution)
        if self.run.evaluation.images is not None:
            self._match(report)
            self._follow_resolutions(report)
        if self.run.evaluation.labelled_train is not None:
            self._probe(report)
        if self.run.evaluation.zero_shot is not None and self.classes_KC is not None:
            self._classify_by_name(report, self.run.evaluation.zero_shot, self.classes_KC)
        return report

    @torch.no_grad()
    def shown(self) -> Shown | None:
        """The first images with all features, at the resolution of the report; None where there are no images to compare on."""
        if self.run.evaluation.images is None:
            return None
        side = self.run.evaluation_resolution
        source = open_source(self.run.evaluation.images)
        batch = next(read_labelled(source, resolution=side, batch_size=SHOWN_IMAGES, stop=SHOWN_IMAGES))
        images = batch.images_BCHW.to(self.substrate.device)
        student = self._student(images)
        return Shown(images, (student.spatial_BTC, student.grid), self._teachers(images), student.adaptors)

    @torch.no_grad()
    def _match(self, report: Report) -> None:
        spatial = {name: MatchStatistics() for name in self.run.teacher_names}
        summary = {name: MatchStatistics() for name in self.run.teacher_names}
        ranks: dict[str, RankMe] = {}
        for images in self._images(report.resolution):
            student = self._student(images)
            ranks.setdefault("student", RankMe()).add(student.spatial_BTC)
            for name, features in self._teachers(images).items():
                self._compare(spatial[name], student, name, features)
                ranks.setdefault(name, RankMe()).add(features.spatial_BTC)
                ranks.setdefault(f"head of {name}", RankMe()).add(student.adaptors[name].spatial_BTC)
                if features.summary_BC is not None and student.adaptors[name].summary_BC is not None:
                    summary[name].add(student.adaptors[name].summary_BC, features.summary_BC)
        report.spatial = {name: asdict(statistics.result()) for name, statistics in spatial.items()}
        learned = [teacher.name for teacher in self.run.teachers if teacher.summary_loss != "none"]
        report.summary = {name: asdict(summary[name].result()) for name in learned}
        report.rankme = {name: rank.result() for name, rank in ranks.items()}

    @torch.no_grad()
    def _follow_resolutions(self, report: Report) -> None:
        sides = self.run.evaluation_resolutions
        curves = {name: {side: MatchStatistics() for side in sides} for name in self.run.teacher_names}
        equivariance = ScaleEquivariance(report.resolution)
        for batches in zip(*(self._images(side) for side in sides), strict=True):
            seen: dict[int, tuple[Tensor, tuple[int, int]]] = {}
            for side, images in zip(sides, batches, strict=True):
                student = self._student(images)
                seen[side] = (student.spatial_BTC, student.grid)
                for name, features in self._teachers(images).items():
                    self._compare(curves[name][side], student, name, features)
            equivariance.add(seen)
        report.curves = {
            name: {side: asdict(statistics.result()) for side, statistics in by_side.items()} for name, by_side in curves.items()
        }
        report.equivariance = equivariance.errors()

    def _probe(self, report: Report) -> None:
        report.probes["student"] = self._probe_one(lambda batch: self._summary_and_patches(self._placed(batch)))
        for teacher in self.run.teachers:
            if teacher.view != "mosaic":
                report.probes[teacher.name] = self._probe_one(lambda batch, name=teacher.name: self._one_teacher(name, self._placed(batch)))
        report.probes[CONTROL] = self._probe_one(self._labels_as_features)

    @torch.no_grad()
    def _classify_by_name(self, report: Report, options: ZeroShotConfig, classes_KC: Tensor) -> None:
        right, total = {"student": 0, options.teacher: 0}, 0
        for batch in read_labelled(
            open_source(str(self.run.evaluation.labelled_test)), resolution=report.resolution, batch_size=self.run.evaluation.batch_size
        ):
            images = batch.images_BCHW.to(self.substrate.device)
            summaries = {
                "student": self._student(images).adaptors[options.teacher].summary_BC,
                options.teacher: self.panel.describe({options.teacher: images}, self._side(images))[options.teacher].summary_BC,
            }
            total += len(images)
            for name, summary_BC in summaries.items():
                right[name] += int((zero_shot_predict(summary_BC, classes_KC).cpu() == batch.classes_B).sum())
        report.zero_shot = {name: count / total for name, count in right.items()}

    def _embed_classes(self, options: ZeroShotConfig) -> Tensor:
        """One vector per class, [classes, C], from the teacher's text tower, which is not kept."""
        teacher = self.run.teacher(options.teacher)
        try:
            # The revision is the teacher's repository's.
            revision = "main" if options.text_model else teacher.revision
            model = options.text_model or teacher.model
            tower = load_text_tower(teacher.library, model, self.substrate.device, teacher.weights, revision)
        except ValueError as error:
            raise ValueError(f"evaluation.zero_shot.teacher={teacher.name}: {error}") from error
        return embed_classes(tower, options.class_names)

    def _probe_one(self, describe: Describe) -> dict[str, float]:
        """kNN and linear accuracy of the summaries (of averaged patches where there is none), mIoU of the patches."""
        options = self.run.evaluation
        train, test = (list(self._labelled(str(path), describe)) for path in (options.labelled_train, options.labelled_test))
        vectors, classes = (torch.cat([item[index] for item in train]) for index in (0, 1))
        queries, answers = (torch.cat([item[index] for item in test]) for index in (0, 1))
        predicted = knn_predict(vectors, classes, queries, num_classes=options.num_classes)
        linear = fit_linear_probe(vectors, classes, num_classes=options.num_classes)
        probe = fit_segmentation_probe(lambda: (item[2] for item in train), num_classes=options.num_classes)
        with torch.no_grad():
            confusion = evaluate_segmentation(probe, (item[2] for item in test), options.num_classes)
        return {
            "knn": accuracy(predicted, answers),
            "linear": accuracy(linear.predict(queries), answers),
            "miou": mean_iou(confusion),
        }

    @torch.no_grad()
    def _labelled(self, path: str, describe: Describe) -> Iterator[tuple[Tensor, Tensor, PatchBatch]]:
        side = self.run.evaluation_resolution
        for batch in read_labelled(open_source(path), resolution=side, batch_size=self.run.evaluation.batch_size):
            assert batch.classes_B is not None and batch.masks_BHW is not None
            vectors_BC, patches_BTC, grid = describe(batch)
            yield vectors_BC.float().cpu(), batch.classes_B, PatchBatch(patches_BTC.float().cpu(), grid, batch.masks_BHW)

    def _summary_and_patches(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        student = self._student(images_BCHW)
        return student.summary_BC, student.spatial_BTC, student.grid

    def _one_teacher(self, name: str, images_BCHW: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        features = self.panel.describe({name: images_BCHW}, self._side(images_BCHW))[name]
        vectors_BC = features.spatial_BTC.mean(1) if features.summary_BC is None else features.summary_BC
        return vectors_BC, features.spatial_BTC, features.grid

    def _labels_as_features(self, batch: LabelledBatch) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Share of each class in every patch of the student's grid, and in the whole image."""
        assert batch.masks_BHW is not None
        shares_BKhw = class_shares(batch.masks_BHW, self.run.evaluation.num_classes, self.run.student.patch_size)
        return shares_BKhw.mean((2, 3)), shares_BKhw.flatten(2).mT, (shares_BKhw.shape[2], shares_BKhw.shape[3])

    def _placed(self, batch: LabelledBatch) -> Tensor:
        return batch.images_BCHW.to(self.substrate.device)

    def _images(self, side: int) -> Iterator[Tensor]:
        options = self.run.evaluation
        for batch in read_labelled(
            open_source(str(options.images)), resolution=side, batch_size=options.batch_size, stop=options.max_images
        ):
            yield batch.images_BCHW.to(self.substrate.device)

    def _student(self, images_BCHW: Tensor) -> RadioFeatures:
        return self.radio.features(images_BCHW)

    def _teachers(self, images_BCHW: Tensor) -> dict[str, TeacherFeatures]:
        return self.panel.describe({name: images_BCHW for name in self.run.teacher_names}, self._side(images_BCHW))

    def _side(self, images_BCHW: Tensor) -> int:
        return images_BCHW.shape[2] // self.run.student.patch_size

    def _compare(self, statistics: MatchStatistics, student: RadioFeatures, name: str, teacher: TeacherFeatures) -> None:
        """Count one batch's patches on the coarser of the two grids (tokens.py)."""
        batch = len(teacher.spatial_BTC)
        mine, theirs = (View.whole(grid, 1.0, batch) for grid in (student.grid, teacher.grid))
        matched = match_grids(student.adaptors[name].spatial_BTC.float(), mine, teacher.spatial_BTC.float(), theirs)
        statistics.add(matched.student_BTC, matched.teacher_BTC)


def format_report(report: Report) -> str:
    """The figures as aligned tables."""
    lines = [f"step {report.step}, {report.resolution} pixels"]
    if report.spatial:
        lines += ["", f"{'teacher':<12} {'MSE':>10} {'fidelity':>9} {'cos. error':>10} {'summary cos.':>12} {'RankMe':>7} {'of head':>8}"]
    for name, match in report.spatial.items():
        summary = f"{report.summary[name]['cosine_error']:12.4f}" if name in report.summary else f"{'-':>12}"
        lines.append(
            f"{name:<12} {match['mse']:>10.4g} {match['fidelity']:>9.3f} {match['cosine_error']:>10.4f} {summary} "
            f"{report.rankme[name]:>7.1f} {report.rankme[f'head of {name}']:>8.1f}"
        )
    if report.curves:
        sides = list(next(iter(report.curves.values())))
        lines += ["", f"{'fidelity at':<12}" + "".join(f"{side:>9}" for side in sides)]
        lines += [
            f"{name:<12}" + "".join(f"{by_side[side]['fidelity']:>9.3f}" for side in sides) for name, by_side in report.curves.items()
        ]
    if report.equivariance:
        errors = [f"{report.equivariance[side]:>9.3f}" if side in report.equivariance else f"{'ref':>9}" for side in sides]
        mean = sum(report.equivariance.values()) / len(report.equivariance)
        lines.append(f"{'scale error':<12}" + "".join(errors) + f"   mean {mean:.3f}")
    if report.probes:
        lines += ["", f"{'network':<12} {'kNN':>7} {'linear':>7} {'mIoU':>7}"]
        lines += [f"{name:<12} {row['knn']:>7.3f} {row['linear']:>7.3f} {row['miou']:>7.3f}" for name, row in report.probes.items()]
    if report.zero_shot:
        lines += ["", f"{'zero-shot':<12} {'accuracy':>9}"]
        lines += [f"{name:<12} {share:>9.3f}" for name, share in report.zero_shot.items()]
    return "\n".join(lines)
