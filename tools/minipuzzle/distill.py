"""Stage 4: training runs of the one Trainer: short and long distillation, and the baselines they are compared with. Each resumes."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_hybrid.config import ModelConfig, OptimizerConfig, RunConfig
from megatron_hybrid.config.run_directory import CHECKPOINTS_NAME
from megatron_hybrid.config.section import Section
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.substrate.launch import run_on_ranks
from megatron_hybrid.substrate.place import place_from_environment
from megatron_hybrid.tasks.layer_losses import LayerLossOptions, LayerPair
from tools.minipuzzle.candidate import Candidate
from tools.minipuzzle.config import DistillConfig, LayerLossConfig
from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.inputs import Inputs, initial_weights, require_same, training_inputs
from tools.minipuzzle.parent import Parent
from tools.minipuzzle.scores import read_json, write_json

Kind = Literal["short", "long", "scratch", "finetune"]
"""short, long: distillation. scratch: no teacher, random weights. finetune: no teacher, the pruned weights."""
DISTILLED: tuple[Kind, ...] = ("short", "long")
"""Those with a teacher."""
MADE_FROM = "made_from.json"
"""In a training's run directory: what it was begun from and with."""


@dataclass(frozen=True)
class DistillEntry:
    """What each rank does."""

    teacher: Path
    options: DistillConfig
    candidate: Candidate

    def __call__(self, run: RunConfig, substrate: Substrate) -> ExitCode:
        """Distil."""
        from megatron_hybrid.distill import distill
        from megatron_hybrid.tasks.distill import DistillOptions

        options = DistillOptions(
            self.teacher,
            self.options.temperature,
            self.options.lm_loss_weight,
            self.options.hidden_loss_weight,
            None if self.options.layer_loss is None else layer_loss_options(self.options.layer_loss, self.candidate),
        )
        return distill(run, options, substrate)


def train_candidate(parent: Parent, candidate: Candidate, kind: Kind) -> int:
    """Run one training to its end, or go on from where it was stopped; return the exit code.

    Raises:
        ValueError: options are missing or do not fit, or the candidate is not pruned yet.
    """
    run = training_run(parent, candidate, kind)
    if place_from_environment(os.environ).rank == 0:
        write_json(run.run_dir / MADE_FROM, training_inputs(parent, run, is_distilled=kind in DISTILLED) | initial_weights(run))
    if kind in DISTILLED:
        return run_on_ranks(DistillEntry(parent.weights, distill_options(parent), candidate), run)
    from megatron_hybrid.pretrain import pretrain

    return run_on_ranks(pretrain, run)


def training_run(parent: Parent, candidate: Candidate, kind: Kind) -> RunConfig:
    """Return the run of one training.

    Raises:
        ValueError: options are missing or do not fit, the candidate is not pruned yet, or the training was begun from other pruned weights
            or with other options.
    """
    files = WorkFiles(parent.config.work_dir)
    start = None if kind == "scratch" else pruned_checkpoint(files.pruned(candidate.name))
    run = _build_run(parent, kind, candidate.model(parent.model), candidate.name, start)
    _require_same_training(run.run_dir, training_inputs(parent, run, is_distilled=kind in DISTILLED) | initial_weights(run))
    return run


def check_trainings(parent: Parent, names: Iterable[str]) -> None:
    """Refuse before any work what a training would refuse later: options that do not fit, or differ from those it was begun with.

    Args:
        parent: its own model stands for those of the candidates, which may not be known yet.
        names: of the candidates that are chosen so far.

    Raises:
        ValueError: names the training and the options.
    """
    for kind in planned_kinds(parent):
        run = _build_run(parent, kind, parent.model, "NAME", None, parallel=parent.config.parallel.model_copy(update={"stages": None}))
        for name in names:
            directory = WorkFiles(parent.config.work_dir).run_dir(kind, name)
            _require_same_training(directory, training_inputs(parent, run, is_distilled=kind in DISTILLED))


def planned_kinds(parent: Parent) -> list[Kind]:
    """Return the trainings that the compression asks for, in order."""
    baselines: tuple[Kind, ...] = ("finetune", "scratch")
    return ["short", "long", *(kind for kind in baselines if getattr(parent.config.baselines, kind))]


def _require_same_training(run_dir: Path, present: Inputs) -> None:
    """Refuse a training that was begun from something else; of what ``present`` does not name, nothing is asked."""
    from megatron_hybrid.checkpoint.store import complete_steps

    if complete_steps(run_dir / CHECKPOINTS_NAME):
        advice = f"Remove {run_dir} to train anew, choose another work_dir, or go back to what it was made from"
        if not (run_dir / MADE_FROM).exists():
            raise ValueError(
                f"{run_dir} has checkpoints, but no {MADE_FROM} to say what they were made from, as those of earlier versions have none; "
                "whether they fit the present options cannot be told. Remove the directory to train anew, or choose another work_dir"
            )
        recorded = read_json(run_dir / MADE_FROM, advice)
        require_same({name: recorded.get(name) for name in present}, present, run_dir, advice)


def _build_run(parent: Parent, kind: Kind, model: ModelConfig, name: str, start: Path | None, **sections: Section) -> RunConfig:
    options, files = distill_options(parent), WorkFiles(parent.config.work_dir)
    tokens = options.short_tokens if kind == "short" else options.long_tokens
    tokens_per_step = parent.batch.global_batch_size * parent.data.sequence_length
    steps = -(-tokens // tokens_per_step)
    baselines = parent.config.baselines
    own: dict[Kind, OptimizerConfig | None] = {"finetune": baselines.finetune_optimizer, "scratch": baselines.scratch_optimizer}
    optimizer = own.get(kind) or options.optimizer
    return parent.build_run(
        files.run_dir(kind, name),
        model,
        steps,
        optimizer=optimizer.model_dump(),
        schedule=options.schedule.model_dump(),
        fp8=options.fp8.model_dump(),
        checkpoint={"every_steps": options.checkpoint_every_steps, "initialize_from": start},
        **{name: section.model_dump() for name, section in sections.items()},
    )


def distill_options(parent: Parent) -> DistillConfig:
    """Return the options of distillation.

    Raises:
        ValueError: there are none.
    """
    if parent.config.distill is None:
        raise ValueError("missing option 'distill': give at least distill.short_tokens, distill.long_tokens and distill.optimizer.lr")
    layer_loss, pipeline, num_layers = parent.config.distill.layer_loss, parent.config.parallel.pipeline, parent.model.num_layers
    if layer_loss is not None and max(layer_loss.layers, default=0) >= num_layers:
        raise ValueError(
            f"distill.layer_loss.layers={list(layer_loss.layers)} must be layers of the parent, which has 0 to {num_layers - 1}"
        )
    if layer_loss is not None and pipeline > 1:
        raise ValueError(
            f"distill.layer_loss needs parallel.pipeline=1, got {pipeline}: losses are made on the last stage, where the streams of "
            "earlier stages' layers are not; use tensor ranks, or drop it"
        )
    return parent.config.distill


def layer_loss_options(config: LayerLossConfig, candidate: Candidate) -> LayerLossOptions:
    """Return which of a candidate's layers is compared with which of its parent's: the one that stands at the same place.

    >>> child = Candidate((0, 2, 3, 6), (), 1, 1, 1)
    >>> options = layer_loss_options(LayerLossConfig(weight=0.5, layers=(2, 5)), child)
    >>> [(pair.student, pair.teacher) for pair in options.pairs]
    [(1, 2), (2, 5)]

    Raises:
        ValueError: nothing is kept up to one of the parent's layers.
    """
    layers = config.layers or candidate.layers
    if layers[0] < candidate.layers[0]:
        raise ValueError(
            f"distill.layer_loss.layers names layer {layers[0]}, but {candidate.name} keeps none of the parent's before its layer "
            f"{candidate.layers[0]}, so that there is nothing to compare; begin there"
        )
    weights = config.layer_weights or (1.0,) * len(layers)
    places = (bisect_right(candidate.layers, layer) - 1 for layer in layers)
    pairs = tuple(LayerPair(place, layer, weight) for place, layer, weight in zip(places, layers, weights, strict=True))
    return LayerLossOptions(pairs, config.kind, config.weight)


def pruned_checkpoint(directory: Path) -> Path:
    """Return the one checkpoint of a pruned model.

    Raises:
        ValueError: there is none.
    """
    from megatron_hybrid.convert.native import NativeSource

    if not directory.exists():
        raise ValueError(f"{directory} is not there; run the prune stage first")
    return NativeSource(directory).path
