"""From a run directory or a Hugging Face directory to a model that can speak: its configuration, its tokenizer and its weights, a stage of
them on each rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor
from tqdm import tqdm

from megatron_hybrid.checkpoint import CheckpointError, load, read_header
from megatron_hybrid.checkpoint.agreement import failing_together
from megatron_hybrid.checkpoint.sharding import shard_parameters
from megatron_hybrid.checkpoint.store import complete_steps, step_name
from megatron_hybrid.config import ModelConfig, ParallelConfig, RunConfig, load_config
from megatron_hybrid.config.run_directory import CHECKPOINTS_NAME, CONFIG_NAME, kept_tokenizer
from megatron_hybrid.config.schema import check_layout
from megatron_hybrid.convert.correspondence import correspondences
from megatron_hybrid.convert.hub import CONFIG as HUB_CONFIG, HubSource
from megatron_hybrid.convert.native import run_of
from megatron_hybrid.convert.source import read_as
from megatron_hybrid.data.build import build_tokenizer
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.generate.companions import Companions, hub_companions, native_companions
from megatron_hybrid.layers.specs import ops_for
from megatron_hybrid.layout.stages import plan_stages
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.transformer_config import build_transformer_config

Precision = Literal["fp32", "bf16"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageModel:
    """A trained model, and what makes its tokens of a text."""

    model: HybridModel
    """This rank's stage, in eval mode."""
    tokenizer: Tokenizer
    companions: Companions
    checkpoint: Path
    """Where the weights came from."""


def is_hub_directory(path: Path) -> bool:
    """Whether a directory is a Hugging Face model, rather than a run directory."""
    return (path / HUB_CONFIG).is_file() and not (path / CONFIG_NAME).is_file()


def load_run(path: Path, *, tensor: int = 1, pipeline: int = 1, precision: Precision | None = None) -> RunConfig:
    """Return the configuration of a model, for the ranks that will generate, whatever layout trained it.

    Args:
        path: a run directory, or a Hugging Face directory.
        tensor: ranks that split the layers.
        pipeline: stages.
        precision: to compute in; unset, the model's own.

    Raises:
        ValueError: ``path`` is neither, or cannot be used, or the model cannot be cut that way.
    """
    if is_hub_directory(path):
        source = HubSource(path)
        dtype = source.specs[correspondences(source.model)[0].hub[0].name].dtype
        run = run_of(source.model, path, precision="fp32" if dtype == torch.float32 else "bf16")
        run = run.model_copy(update={"data": run.data.model_copy(update={"tokenizer": source.companions.tokenizer})})
    elif (path / CONFIG_NAME).is_file():
        run = load_config(path / CONFIG_NAME)
    else:
        raise ValueError(
            f"{path} is no run directory: it has no {CONFIG_NAME}; nor a Hugging Face one: it has no {HUB_CONFIG}; give the run_dir of a "
            "pretraining run or a model's directory"
        )
    model = run.model.model_copy(update={"pattern": run.model.layer_kinds})
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, data=1)
    check_layout(model, parallel, run.data.sequence_length)
    # Nothing is resumed, and some of what sampling needs has no deterministic form on a GPU.
    runtime = run.runtime.model_copy(update={"device": "auto", "threads_per_rank": None, "deterministic": False})
    train = run.train.model_copy(update={"precision": precision or run.train.precision})
    return run.model_copy(update={"model": model, "parallel": parallel, "runtime": runtime, "train": train})


def load_language_model(run: RunConfig, path: Path, substrate: Substrate, *, step: int | None = None) -> LanguageModel:
    """Load the weights of the newest checkpoint whose weights are sound, or of the one after ``step`` steps; collective over all ranks.

    Nothing but the weights is read, each tensor into its place at once.

    Args:
        run: as ``load_run`` returned it; its ``run_dir`` is not read, so a run directory may have moved.
        path: the same directory.
        substrate: the ranks.
        step: not for Hugging Face directories, which have no steps.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged, or the tokenizer is missing or does not fit the model.
    """
    if not is_hub_directory(path):
        return _load_native(run, path, substrate, step)
    if step is not None:
        raise ValueError(f"{path} is a Hugging Face directory, which has no checkpoint of a step; leave the step out")
    tokenizer = build_tokenizer(run)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer.json and no .model file; put the tokenizer there that belongs to the model")
    return LanguageModel(_load_hub(run, path, substrate), tokenizer, hub_companions(path, tokenizer), path)


def _load_native(run: RunConfig, path: Path, substrate: Substrate, step: int | None) -> LanguageModel:
    directory = path / CHECKPOINTS_NAME
    steps = complete_steps(directory)
    there = f"it has those of steps {', '.join(map(str, steps))}" if steps else "it has none"
    if step is not None:
        if step not in steps:
            raise ValueError(f"{directory} has no checkpoint of step {step}; {there}")
        steps = [step]
    for each in reversed(steps):
        checkpoint = directory / step_name(each)
        try:
            return _load_checkpoint(run, path, checkpoint, substrate)
        except CheckpointError as error:
            if step is not None:
                raise ValueError(f"{error}; use another checkpoint") from error
            if substrate.rank == 0:
                _log.warning("skipping checkpoint %s: %s", checkpoint.name, error)
    raise ValueError(f"{directory} has no sound checkpoint ({there}); let the run save one first")


def _load_checkpoint(run: RunConfig, path: Path, checkpoint: Path, substrate: Substrate) -> LanguageModel:
    """Make this rank's stage and read its weights, and nothing else of the training state."""
    with failing_together(substrate.control_group):
        header = read_header(checkpoint)
        run = run.model_copy(update={"model": _saved_architecture(checkpoint, header, run.model)})
        kept = run.data.model_copy(update={"tokenizer": kept_tokenizer(run, path)})
        tokenizer = build_tokenizer(run.model_copy(update={"data": kept}))
        if tokenizer is None:
            raise ValueError(f"{path / CONFIG_NAME} names no tokenizer; set data.tokenizer in it to the one that made the corpora")
    model = build_stage(run, substrate)
    sharded = shard_parameters(model.named_global_parameters(), substrate.tensor_group, substrate.data_group)
    weights = load(checkpoint, {"model": sharded}, group=substrate.control_group)["model"]
    _fill(model, weights.__getitem__)
    return LanguageModel(model, tokenizer, native_companions(run, path, tokenizer, header), checkpoint)


def _saved_architecture(checkpoint: Path, header: Mapping[str, Any], configured: ModelConfig) -> ModelConfig:
    """The configured model with all that decides the weights taken from the checkpoint: the configuration is the newest start's, which need
    not have got as far as a checkpoint."""
    try:
        return ModelConfig.model_validate(configured.model_dump() | header["model"])
    except ValidationError as error:
        raise ValueError(f"{checkpoint} holds no language model that this program knows: {error}") from error


def _load_hub(run: RunConfig, path: Path, substrate: Substrate) -> HybridModel:
    """Make this rank's stage and fill it tensor by tensor from safetensors files."""
    source, model = HubSource(path), build_stage(run, substrate)
    known = {each.parameter: each for each in correspondences(run.model)}

    def read(name: str) -> Tensor:
        each = known[name]
        tensors = read_as("native", source, each, torch.float32 if each.is_fp32 else model.config.params_dtype, run.model)
        cut = (substrate.tensor_rank, substrate.tensor_size)
        parts = [tensor if spec.axis is None else tensor.chunk(cut[1], spec.axis)[cut[0]] for tensor, spec in zip(tensors, each.native)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    _fill(model, read, show_progress=substrate.rank == 0)
    return model


def build_stage(run: RunConfig, substrate: Substrate) -> HybridModel:
    """Make this rank's stage on its device, in eval mode; its weights are not set."""
    stages = plan_stages(run.model, run.parallel, run.data.sequence_length)
    config, kernels = build_transformer_config(run, substrate), run.kernels
    if substrate.device.type == "cuda" and kernels.attention == "auto":
        # cuDNN makes a plan for every length that comes, and prompts come in all lengths; so does cuBLASLt.
        kernels = kernels.model_copy(update={"attention": "sdpa"})
    if kernels.linear == "cublaslt":
        kernels = kernels.model_copy(update={"linear": "cublas"})
    with torch.device(substrate.device):
        model = HybridModel(
            run.model,
            config,
            ops_for(substrate.device, config.params_dtype, choices=kernels, chunk_length=run.model.mamba_chunk_size),
            layer_range=stages[substrate.pipeline_rank],
            is_first_stage=substrate.pipeline_rank == 0,
            is_last_stage=substrate.pipeline_rank == len(stages) - 1,
        )
    return model.to(substrate.device).eval().requires_grad_(False)


def _fill(model: HybridModel, read: Callable[[str], Tensor], *, show_progress: bool = False) -> None:
    """Set every parameter to what ``read`` returns for its global name."""
    parameters = list(model.named_global_parameters())
    with torch.no_grad():
        for name, parameter in tqdm(
            parameters, desc="reading weights", unit="tensor", leave=False, disable=None if show_progress else True
        ):
            parameter.copy_(read(name).view(parameter.shape))
