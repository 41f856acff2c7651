"""Megatron-LM's torch_dist checkpoints: ``iter_NNNNNNN`` directories with the arguments of the run in ``common.pt``."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.run_directory import TOKENIZER_FOLDER
from megatron_hybrid.convert.companions import Companions, copy_tokenizer, tokenizer_in
from megatron_hybrid.convert.correspondence import correspondences
from megatron_hybrid.convert.source import Form
from megatron_hybrid.convert.specs import TensorSpec, check_specs
from megatron_hybrid.convert.target import Plan
from megatron_hybrid.convert.torch_dist import TorchDistReader, finish_directory
from megatron_hybrid.convert.torch_dist_metadata import METADATA
from megatron_hybrid.convert.torch_dist_target import TorchDistTarget
from megatron_hybrid.convert.widen import require_one_width

TRACKER = "latest_checkpointed_iteration.txt"
_ARGUMENTS = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_num_groups": "mamba_num_groups",
    "mamba_state_dim": "mamba_state_dim",
    "norm_eps": "norm_epsilon",
    "init_std": "init_method_std",
}
_FIXED = {
    "is_hybrid_model": True,
    "normalization": "RMSNorm",
    "squared_relu": True,
    "swiglu": False,
    "add_bias_linear": False,
    "add_position_embedding": False,
    "position_embedding_type": "none",
    "untie_embeddings_and_output_weights": True,
    "group_query_attention": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
_CHECKED = ("normalization", "squared_relu", "swiglu", "add_bias_linear", "position_embedding_type", "untie_embeddings_and_output_weights")
"""Arguments that decide what the weights mean, and have one value in every model of ours."""


class MegatronSource:
    """A Megatron-LM checkpoint.

    Args:
        path: an ``iter_NNNNNNN`` directory, or the folder above with its tracker file.
        model: what the checkpoint is of; needed when its ``common.pt`` has no arguments, and compared with them when it has.
        vocab_size: tokens of the vocabulary without padding; needed when the arguments have no ``vocab_size``.

    Raises:
        ValueError: it is not complete, its architecture is unknown or another, or files are damaged; the message names the tensors.
    """

    form: Form = "native"

    def __init__(self, path: Path, *, model: ModelConfig | None = None, vocab_size: int | None = None) -> None:
        self.path = _find_iteration(path)
        self._reader = TorchDistReader(self.path)
        self.specs: dict[str, TensorSpec] = self._reader.specs
        common = _read_common(self.path, is_needed=model is None)
        arguments = common.get("args")
        if arguments is None and model is None:
            raise ValueError(
                f"{self.path}/common.pt has no arguments; say with --config what the checkpoint is of (config.json, run YAML or preset)"
            )
        padded_vocab_size = self._padded_vocab_size()
        if arguments is not None:
            own = model_from_arguments(
                vars(arguments), padded_vocab_size=padded_vocab_size, vocab_size=vocab_size or (model and model.vocab_size)
            )
            _check_agreement(self.path, own, model)
            model = own
        self.model = with_padding(model, padded_vocab_size)
        check_specs(self.path, self.specs, {tensor.key: tensor.shape for each in correspondences(self.model) for tensor in each.native})
        tokenizer, files = tokenizer_in(self.path.parent / TOKENIZER_FOLDER)
        self.companions = Companions(
            tokenizer_files=files,
            tokenizer=tokenizer,
            sequence_length=getattr(arguments, "seq_length", None) or Companions.sequence_length,
            step=int(common.get("iteration", 0)),
            **common.get("companions", {}),
        )

    def read(self, name: str) -> Tensor:
        """Return a tensor by its key."""
        return self._reader.read(name)

    def _padded_vocab_size(self) -> int:
        key = "embedding.word_embeddings.weight"
        if key not in self.specs:
            raise ValueError(f"{self.path} does not have {key}: it is no language model, or not all of one")
        return self.specs[key].shape[0]


class MegatronTarget(TorchDistTarget):
    """A folder with one iteration, the tracker file that names it, and the tokenizer."""

    @property
    def _iteration(self) -> int:
        # Megatron-LM refuses a tracker that says 0.
        return max(1, self._plan.companions.step)

    def weights_folder(self, directory: Path) -> Path:
        """See ``TorchDistTarget``."""
        return directory / f"iter_{self._iteration:07d}"

    def finish(self, directory: Path, written: Sequence[list[dict[str, Any]]]) -> None:
        """See ``Target``."""
        copy_tokenizer(self._plan.companions, directory / TOKENIZER_FOLDER, self._final / TOKENIZER_FOLDER)
        common = {
            "args": argparse.Namespace(**arguments_of(self._plan, self._iteration)),
            "checkpoint_version": 3.0,
            "iteration": self._iteration,
            "num_floating_point_operations_so_far": 0,
            "companions": self._plan.companions.stated(),
        }
        finish_directory(self.weights_folder(directory), [record for each in written for record in each], common)
        (directory / TRACKER).write_text(str(self._iteration))

    def read_back(self, directory: Path) -> MegatronSource:
        """See ``Target``."""
        return MegatronSource(directory)


def arguments_of(plan: Plan, iteration: int) -> dict[str, Any]:
    """Return the arguments that Megatron-LM compares with its own, or takes over with ``--use-checkpoint-args``.

    Raises:
        ValueError: MLP layers differ in width.
    """
    model, layout = plan.model, plan.layout
    require_one_width(model, "Megatron-LM")
    return {
        **{theirs: getattr(model, ours) for ours, theirs in _ARGUMENTS.items()},
        **_FIXED,
        "hybrid_override_pattern": model.layer_kinds,
        "num_layers": model.num_layers,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.padded_vocab_size,
        "make_vocab_size_divisible_by": model.vocab_divisible_by,
        "seq_length": plan.companions.sequence_length,
        "max_position_embeddings": plan.companions.sequence_length,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "data_parallel_size": 1,
        "world_size": layout.tensor * layout.pipeline,
        "bf16": plan.main_dtype == "bfloat16",
        "fp16": plan.main_dtype == "float16",
        "params_dtype": plan.dtypes[0],
        "ckpt_format": "torch_dist",
        "use_distributed_optimizer": False,
        "iteration": iteration,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def model_from_arguments(arguments: dict[str, Any], *, padded_vocab_size: int, vocab_size: int | None) -> ModelConfig:
    """Return the model that Megatron-LM's arguments describe.

    Raises:
        ValueError: an argument is missing, or asks for what our layers do not do; the message names it.
    """
    for name in _CHECKED:
        if arguments.get(name, _FIXED[name]) != _FIXED[name]:
            raise ValueError(f"the checkpoint was trained with {name}={arguments[name]!r}; only {_FIXED[name]!r} can be converted")
    pattern = arguments.get("hybrid_override_pattern") or arguments.get("hybrid_layer_pattern")
    names = {ours: theirs for ours, theirs in _ARGUMENTS.items() if ours not in ("mamba_num_heads", "num_kv_heads")}
    missing = [theirs for theirs in names.values() if arguments.get(theirs) is None]
    if pattern is None or missing:
        raise ValueError(
            f"the checkpoint's arguments do not have {', '.join(missing) or 'hybrid_override_pattern'}, so they do not say what it is of"
        )
    if "/" in pattern:
        raise ValueError(f"hybrid_override_pattern {pattern!r} has multi-token prediction layers (/), which are not converted")
    inner = 2 * arguments["hidden_size"]
    fields = {ours: arguments[theirs] for ours, theirs in names.items()}
    # Unset, Megatron-LM takes the heads from an inner width of 2 x hidden_size, and one KV group per head.
    fields["mamba_num_heads"] = arguments.get("mamba_num_heads") or inner // arguments["mamba_head_dim"]
    fields["num_kv_heads"] = arguments["num_query_groups"] if arguments.get("group_query_attention") else arguments["num_attention_heads"]
    size = vocab_size or arguments.get("vocab_size")
    if size is None:
        raise ValueError(
            f"the checkpoint's arguments do not have vocab_size; say with --vocab-size how many of the {padded_vocab_size:,} rows are"
        )
    try:
        return with_padding(ModelConfig(pattern=pattern, vocab_size=size, **fields), padded_vocab_size)
    except ValidationError as error:
        raise ValueError(f"the checkpoint's arguments do not describe a model of ours: {error}") from None


def with_padding(model: ModelConfig, padded_vocab_size: int) -> ModelConfig:
    """Return the model with a padding unit that gives this many rows: its own, the largest power of two that does, or all rows.

    Raises:
        ValueError: there are fewer rows than tokens.
    """
    if padded_vocab_size < model.vocab_size:
        raise ValueError(f"the embedding has {padded_vocab_size:,} rows, but {model.vocab_size:,} tokens: it is of another vocabulary")
    units = [model.vocab_divisible_by, *(1 << exponent for exponent in range(17, -1, -1)), padded_vocab_size]
    candidates = (model.model_copy(update={"vocab_divisible_by": unit}) for unit in units)
    return next(candidate for candidate in candidates if candidate.padded_vocab_size == padded_vocab_size)


def _check_agreement(path: Path, own: ModelConfig, given: ModelConfig | None) -> None:
    if given is None:
        return
    ignored = {"vocab_divisible_by", "init_std", "mamba_chunk_size", "pattern"}
    here, there = (
        given.model_dump(exclude=ignored) | {"layers": given.layer_kinds},
        own.model_dump(exclude=ignored) | {"layers": own.layer_kinds},
    )
    differences = [f"{name} is {there[name]!r} there and {here[name]!r} in --config" for name in here if here[name] != there[name]]
    if differences:
        raise ValueError(f"{path} was trained with other arguments: {'; '.join(differences)}")


def _find_iteration(path: Path) -> Path:
    if (path / METADATA).is_file():
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        raise ValueError(f"{path} is neither a torch_dist checkpoint (no {METADATA}) nor a folder of them (no {TRACKER})")
    text = tracker.read_text().strip()
    if not re.fullmatch(r"\d+|release", text):
        raise ValueError(f"{tracker} has {text!r}, expected an iteration")
    return path / (text if text == "release" else f"iter_{int(text):07d}")


def _read_common(path: Path, *, is_needed: bool) -> dict[str, Any]:
    """Read ``common.pt`` without letting it run code: one with more than plain values is refused, or passed over if it can be."""
    file = path / "common.pt"
    if not file.is_file():
        return {}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            common = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, AttributeError, KeyError) as error:
        unsafe = _unsafe_types(file)
        if not unsafe:
            raise ValueError(f"{file} is damaged ({type(error).__name__}); copy it again") from None
        if not is_needed:
            return {}
        raise ValueError(
            f"{file} has objects that could run code ({', '.join(unsafe[:3])}), so it is not read; say with --config what the checkpoint "
            "is of"
        ) from None
    if not isinstance(common, dict) or not isinstance(common.get("args", argparse.Namespace()), argparse.Namespace | None):
        raise ValueError(f"{file} is not what Megatron-LM writes: expected a dictionary with its arguments; copy it again")
    return common


def _unsafe_types(file: Path) -> list[str]:
    """Names of what a file would call beside plain values and arguments; none where it cannot be read at all."""
    try:
        return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - {"argparse.Namespace"})
    except Exception:  # damaged pickles raise nearly anything
        return []
