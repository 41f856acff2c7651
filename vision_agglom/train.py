"""Distillation on one rank. From here the way to the optimizer step is megatron_hybrid's train/trainer.py, then train/step.py."""

from __future__ import annotations

from megatron_hybrid.run_directory import prepare_plain_directory
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.train.callback import Callback
from megatron_hybrid.train.callbacks.console import ConsoleLog
from megatron_hybrid.train.callbacks.metrics_file import MetricsFile
from megatron_hybrid.train.callbacks.tensorboard import TensorBoardLog
from megatron_hybrid.train.callbacks.validation import Validation
from megatron_hybrid.train.callbacks.wandb import WandbLog
from megatron_hybrid.train.trainer import Trainer
from vision_agglom.config.schema import VisionConfig
from vision_agglom.curves import CurvesCallback
from vision_agglom.students.build import build_transformer_config
from vision_agglom.task import Distillation
from vision_agglom.teachers.load import load_teacher


def train(run: VisionConfig, substrate: Substrate) -> ExitCode:
    """Train to the last checkpoint. Every rank runs this, with its process groups built."""
    config = build_transformer_config(run, substrate)
    task = Distillation(run, config, substrate, load=load_teacher)
    trainer = Trainer(run, task, config, substrate, vision_callbacks(run, substrate), task.plan.learning_rate)
    trainer.resume()
    if trainer.is_finished:
        if substrate.rank == 0:
            print(f"nothing to do: {run.run_dir} is at step {trainer.state.step}, the end of the run; add steps or a stage", flush=True)
        return ExitCode.FINISHED
    # Only now: a start that the checkpoint refuses leaves the directory as it was.
    prepare_plain_directory(run, substrate)
    return trainer.train()


def vision_callbacks(run: VisionConfig, substrate: Substrate) -> list[Callback]:
    """Validation on every rank; what writes or prints on rank 0 alone."""
    callbacks: list[Callback] = []
    if substrate.rank == 0:
        callbacks += [ConsoleLog(run, "img"), MetricsFile(run), CurvesCallback(run)]
        if run.logging.tensorboard:
            callbacks.append(TensorBoardLog(run))
        if run.logging.wandb_project:
            callbacks.append(WandbLog(run))
    if run.validation.sources:
        callbacks.append(Validation())
    return callbacks
