"""Distillation on one rank: pretraining's loop with a teacher. From here the way is tasks/distill.py and train/trainer.py."""

from __future__ import annotations

from megatron_hybrid.config import RunConfig
from megatron_hybrid.run_directory import prepare_run_directory
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from megatron_hybrid.tasks.distill import Distillation, DistillOptions
from megatron_hybrid.train.callbacks import standard_callbacks
from megatron_hybrid.train.trainer import Trainer


def distill(run: RunConfig, options: DistillOptions, substrate: Substrate) -> ExitCode:
    """Train the student to the last checkpoint, or go on from where it stands. Every rank runs this, with its process groups built."""
    task = Distillation(run, options, build_transformer_config(run, substrate), substrate)
    trainer = Trainer(run, task, task.pipeline_config, substrate, standard_callbacks(run, substrate))
    trainer.resume()
    if trainer.is_finished:
        return ExitCode.FINISHED
    prepare_run_directory(run, substrate)
    return trainer.train()
