"""From a run directory to a model that can speak: its configuration, its tokenizer and the weights of one checkpoint, on one rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from megatron_hybrid.checkpoint import CheckpointError, CheckpointStore, load, read_header
from megatron_hybrid.checkpoint.sharding import shard_parameters
from megatron_hybrid.checkpoint.store import complete_steps, step_name
from megatron_hybrid.config import ModelConfig, RunConfig, load_config
from megatron_hybrid.config.run_directory import CHECKPOINTS_NAME, CONFIG_NAME, kept_tokenizer
from megatron_hybrid.data.build import build_tokenizer
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.layers.specs import ops_for
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.transformer_config import build_transformer_config

_ONE_RANK = ("parallel={data: 1}", "runtime.device=auto", "runtime.threads_per_rank=null")
"""Overrides that replace what the configuration says about where it was trained."""


@dataclass(frozen=True)
class LanguageModel:
    """A trained model, and what makes its tokens of a text."""

    model: HybridModel
    """All of it, in eval mode."""
    tokenizer: Tokenizer
    resets_at_documents: bool
    """Whether training began every document from an empty state, instead of after the end-of-document token of another."""
    checkpoint: Path
    """Where the weights came from."""


def load_run(run_dir: Path) -> RunConfig:
    """Return a run's configuration, for one rank of this host, whatever layout trained it.

    Raises:
        ValueError: ``run_dir`` holds no configuration, or one that cannot be used.
    """
    file = run_dir / CONFIG_NAME
    if not file.is_file():
        raise ValueError(f"{run_dir} is no run directory: it has no {CONFIG_NAME}; give the run_dir of a pretraining run")
    return load_config(file, _ONE_RANK)


def load_language_model(run: RunConfig, run_dir: Path, substrate: Substrate, *, step: int | None = None) -> LanguageModel:
    """Load the weights of the newest sound checkpoint of a run, or of the one after ``step`` steps.

    Args:
        run: as ``load_run`` returned it; its ``run_dir`` is not read, so a run directory may have moved.
        run_dir: where the checkpoints are.
        substrate: one rank.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged, or the tokenizer is missing or does not fit the model.
    """
    checkpoint = _find_checkpoint(run_dir / CHECKPOINTS_NAME, step, substrate)
    # The checkpoint knows what it is: the configuration is the newest start's, which need not have got as far as a checkpoint.
    data = run.data.model_copy(update={"tokenizer": kept_tokenizer(run, run_dir)})
    run = run.model_copy(update={"model": _saved_architecture(checkpoint, run.model), "data": data})
    tokenizer = build_tokenizer(run)
    if tokenizer is None:
        raise ValueError(f"{run_dir / CONFIG_NAME} names no tokenizer; set data.tokenizer in it to the one that made the corpora")
    return LanguageModel(_load_model(run, checkpoint, substrate), tokenizer, run.data.reset_at_documents, checkpoint)


def _find_checkpoint(directory: Path, step: int | None, substrate: Substrate) -> Path:
    steps = complete_steps(directory)
    there = f"it has those of steps {', '.join(map(str, steps))}" if steps else "it has none"
    if step is not None:
        if step not in steps:
            raise ValueError(f"{directory} has no checkpoint of step {step}; {there}")
        return directory / step_name(step)
    newest = CheckpointStore(directory, keep_last=None, asynchronous=False, group=substrate.control_group).newest()
    if newest is None:
        raise ValueError(f"{directory} has no sound checkpoint ({there}); let the run save one first")
    return newest


def _saved_architecture(checkpoint: Path, configured: ModelConfig) -> ModelConfig:
    """The configured model with all that decides the weights taken from the checkpoint."""
    try:
        return ModelConfig.model_validate(configured.model_dump() | read_header(checkpoint)["model"])
    except ValidationError as error:
        raise ValueError(f"{checkpoint} holds no language model that this program knows: {error}") from error


def _load_model(run: RunConfig, checkpoint: Path, substrate: Substrate) -> HybridModel:
    """Make the whole model on this rank and read its weights, and nothing else of the training state."""
    config = build_transformer_config(run, substrate)
    model = HybridModel(
        run.model,
        config,
        ops_for(substrate.device, config.params_dtype, choices=run.kernels, chunk_length=run.model.mamba_chunk_size),
        layer_range=(0, run.model.num_layers),
        is_first_stage=True,
        is_last_stage=True,
    )
    model.to(substrate.device).eval()
    sharded = shard_parameters(model.named_global_parameters(), substrate.tensor_group, substrate.data_group)
    try:
        weights = load(checkpoint, {"model": sharded}, group=substrate.control_group)["model"]
    except CheckpointError as error:
        raise ValueError(f"{error}; use another checkpoint") from error
    with torch.no_grad():
        for name, parameter in model.named_global_parameters():
            parameter.copy_(weights[name])
    return model
