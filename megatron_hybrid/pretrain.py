"""Pretraining on one rank. From here the way to the optimizer step is train/trainer.py, then train/step.py."""

from __future__ import annotations

from megatron_hybrid.config import RunConfig
from megatron_hybrid.data.build import describe_blend
from megatron_hybrid.layers.specs import explain_implementations
from megatron_hybrid.model.build import called_operations
from megatron_hybrid.run_directory import prepare_run_directory
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from megatron_hybrid.tasks.pretrain import Pretraining
from megatron_hybrid.train.callbacks import standard_callbacks
from megatron_hybrid.train.trainer import Trainer


def pretrain(run: RunConfig, substrate: Substrate) -> ExitCode:
    """Train to the last checkpoint. Every rank runs this, with its process groups built."""
    config = build_transformer_config(run, substrate)
    task = Pretraining(run, config, substrate)
    if substrate.rank == 0:
        print(describe_blend(task.stream, run.total_samples), flush=True)
        kernels = explain_implementations(substrate.device, config.params_dtype, run.kernels, called_operations(run))
        print(f"kernels: {kernels}", flush=True)
    trainer = Trainer(run, task, config, substrate, standard_callbacks(run, substrate))
    trainer.resume()
    if trainer.is_finished:
        if substrate.rank == 0:
            print(
                f"nothing to do: {run.run_dir} is at step {trainer.state.step}, the end of the run; raise train.steps to go on", flush=True
            )
        return ExitCode.FINISHED
    # Only now: a start that the checkpoint refuses leaves the directory as it was.
    prepare_run_directory(run, substrate)
    return trainer.train()
