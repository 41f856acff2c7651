"""Stage 4: training runs of the one Trainer: short and long distillation, and the baselines they are compared with. Each resumes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_hybrid.config import OptimizerConfig, RunConfig
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.substrate.launch import run_on_ranks
from tools.minipuzzle.candidate import Candidate
from tools.minipuzzle.config import DistillConfig
from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.parent import Parent

Kind = Literal["short", "long", "scratch", "finetune"]
"""short, long: distillation. scratch: no teacher, random weights. finetune: no teacher, the pruned weights."""


@dataclass(frozen=True)
class DistillEntry:
    """What each rank does."""

    teacher: Path
    options: DistillConfig

    def __call__(self, run: RunConfig, substrate: Substrate) -> ExitCode:
        """Distil."""
        from megatron_hybrid.distill import distill
        from megatron_hybrid.tasks.distill import DistillOptions

        options = DistillOptions(self.teacher, self.options.temperature, self.options.lm_loss_weight, self.options.hidden_loss_weight)
        return distill(run, options, substrate)


def train_candidate(parent: Parent, candidate: Candidate, kind: Kind) -> int:
    """Run one training to its end, or go on from where it was stopped; return the exit code.

    Raises:
        ValueError: options are missing or do not fit, or the candidate is not pruned yet.
    """
    run = training_run(parent, candidate, kind)
    if kind in ("short", "long"):
        return run_on_ranks(DistillEntry(parent.weights, distill_options(parent)), run)
    from megatron_hybrid.pretrain import pretrain

    return run_on_ranks(pretrain, run)


def training_run(parent: Parent, candidate: Candidate, kind: Kind) -> RunConfig:
    """Return the run of one training.

    Raises:
        ValueError: options are missing or do not fit, or the candidate is not pruned yet.
    """
    options, files = distill_options(parent), WorkFiles(parent.config.work_dir)
    tokens = options.short_tokens if kind == "short" else options.long_tokens
    tokens_per_step = parent.config.batch.global_batch_size * parent.data.sequence_length
    steps = -(-tokens // tokens_per_step)
    optimizer: OptimizerConfig = options.optimizer
    checkpoint: dict[str, Any] = {"every_steps": options.checkpoint_every_steps}
    if kind == "scratch":
        optimizer = parent.config.baselines.scratch_optimizer or optimizer
    else:
        checkpoint["initialize_from"] = pruned_checkpoint(files.pruned(candidate.name))
    return parent.build_run(
        files.run_dir(kind, candidate.name),
        candidate.model(parent.model),
        steps,
        optimizer=optimizer.model_dump(),
        schedule=options.schedule.model_dump(),
        fp8=options.fp8.model_dump(),
        checkpoint=checkpoint,
    )


def distill_options(parent: Parent) -> DistillConfig:
    """Return the options of distillation.

    Raises:
        ValueError: there are none.
    """
    if parent.config.distill is None:
        raise ValueError("missing option 'distill': give at least distill.short_tokens, distill.long_tokens and distill.optimizer.lr")
    if parent.config.batch is None:
        raise ValueError("missing option 'batch': give batch.global_batch_size")
    return parent.config.distill


def pruned_checkpoint(directory: Path) -> Path:
    """Return the one checkpoint of a pruned model.

    Raises:
        ValueError: there is none.
    """
    from megatron_hybrid.convert.native import NativeSource

    if not directory.exists():
        raise ValueError(f"{directory} is not there; run the prune stage first")
    return NativeSource(directory).path
