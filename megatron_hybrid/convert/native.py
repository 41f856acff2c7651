"""Our own checkpoints: a run directory, or one checkpoint in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from megatron_hybrid.checkpoint.agreement import CheckpointError
from megatron_hybrid.checkpoint.digest import shard_digest
from megatron_hybrid.checkpoint.header import HEADER, header_text, read_header
from megatron_hybrid.checkpoint.manifest import MANIFEST, Manifest, TensorFacts, check_contents, check_sizes, measure
from megatron_hybrid.checkpoint.store import LATEST, complete_steps, step_name
from megatron_hybrid.config import ModelConfig, RunConfig, TokenizerConfig, dump_config, load_config
from megatron_hybrid.config.run_directory import CHECKPOINTS_NAME, CONFIG_NAME, TOKENIZER_FOLDER, kept_tokenizer
from megatron_hybrid.convert.companions import Companions, copy_tokenizer, files_in, files_of, prompt_start_of, with_tokenizer
from megatron_hybrid.convert.correspondence import NativeTensor, correspondences
from megatron_hybrid.convert.source import Form
from megatron_hybrid.convert.specs import TensorSpec, check_specs
from megatron_hybrid.convert.torch_dist import TorchDistReader, finish_directory
from megatron_hybrid.convert.torch_dist_target import TorchDistTarget

_CONFIG_COMMENT = """\
# Made by tools.convert_checkpoint. model and data.tokenizer are the checkpoint's; data.sources, optimizer and train say nothing about it
# and stand here because a run has to have them. To train on: a configuration of your own with checkpoint.initialize_from={checkpoint}
"""


class NativeSource:
    """One of our checkpoints. Every tensor that is read is compared with the manifest.

    Args:
        path: a run directory, whose newest complete checkpoint is taken, or a checkpoint directory.
        tokenizer: taken instead of the one that the run names.

    Raises:
        ValueError: it is neither, or damaged, or not complete; the message names the file or the tensors.
    """

    form: Form = "native"

    def __init__(self, path: Path, *, tokenizer: TokenizerConfig | None = None) -> None:
        self.path, self._tokenizer = _find_checkpoint(path), tokenizer
        header = read_header(self.path)
        try:
            self.model = ModelConfig.model_validate(header["model"])
            self._manifest = Manifest.read(self.path)
            check_sizes(self.path, self._manifest)
            check_contents(self.path, self._manifest, [name for name in self._manifest.files if not name.endswith(".distcp")])
        except ValidationError as error:
            raise ValueError(f"{self.path} holds no language model that this program knows: {error}") from error
        except CheckpointError as error:
            raise ValueError(f"{error}; use another checkpoint") from error
        self._reader = TorchDistReader(self.path)
        self.specs: dict[str, TensorSpec] = self._reader.specs
        check_specs(self.path, self.specs, {tensor.key: tensor.shape for each in correspondences(self.model) for tensor in each.native})
        self._step: int = header["state"]["step"]
        self._stated: dict[str, Any] = header.get("companions", {})

    @cached_property
    def companions(self) -> Companions:
        """Looked for when they are wanted: a run directory that is not complete names a tokenizer that is not there yet.

        Raises:
            ValueError: the run's configuration or tokenizer cannot be read.
        """
        run_dir = self.path.parent.parent
        run = load_config(run_dir / CONFIG_NAME) if (run_dir / CONFIG_NAME).is_file() else None
        known = Companions(step=self._step)
        if run is not None:
            files = files_in(run_dir / TOKENIZER_FOLDER)
            known = replace(known, sequence_length=run.data.sequence_length, prompt_start=prompt_start_of(run), tokenizer_files=files)
        # A converted checkpoint says what its source said.
        known = replace(known, **self._stated)
        tokenizer = self._tokenizer or (run and _tokenizer_of(run, run_dir))
        if tokenizer is None:
            return known
        if self._tokenizer is None and self._stated:
            return replace(known, tokenizer=tokenizer, tokenizer_files=files_of(tokenizer))
        return with_tokenizer(known, tokenizer)

    def read(self, name: str) -> Tensor:
        """Return a tensor by its key.

        Raises:
            ValueError: it is not what was saved.
        """
        tensor = self._reader.read(name)
        if _facts(tensor) != self._manifest.tensors[name]:
            raise ValueError(f"{self.path}: {name} is not what was saved: its digest differs; use another checkpoint")
        return tensor


class NativeTarget(TorchDistTarget):
    """A run directory with one checkpoint of weights, that generation reads and training starts from."""

    def weights_folder(self, directory: Path) -> Path:
        """See ``TorchDistTarget``."""
        return directory / CHECKPOINTS_NAME / step_name(self._plan.companions.step)

    def finish(self, directory: Path, written: Sequence[list[dict[str, Any]]]) -> None:
        """See ``Target``."""
        checkpoint, records = self.weights_folder(directory), [record for each in written for record in each]
        finish_directory(checkpoint, records, {})
        step = self._plan.companions.step
        # No stream of samples and no optimizer is behind these weights, so a run that would continue them is refused.
        header = {"state": {"step": step, "samples": 0}, "model": self._plan.model.architecture(), "data": {}, "training": {}}
        header["companions"] = self._plan.companions.stated()
        (checkpoint / HEADER).write_text(header_text(header))
        files = {file.name: measure(file) for file in sorted(checkpoint.iterdir()) if file.name != MANIFEST}
        tensors = {record["key"]: TensorFacts(tuple(record["whole"]), record["dtype"], record["digest"]) for record in records}
        (checkpoint / MANIFEST).write_text(Manifest(files, tensors).to_text(), encoding="ascii")
        (directory / CHECKPOINTS_NAME / LATEST).write_text(step_name(step) + "\n")
        tokenizer = copy_tokenizer(self._plan.companions, directory / TOKENIZER_FOLDER, self._final.absolute() / TOKENIZER_FOLDER)
        run = run_of(self._plan.model, self._final, precision="fp32" if self._plan.main_dtype == "float32" else "bf16")
        run = run.model_copy(
            update={"data": run.data.model_copy(update={"tokenizer": tokenizer, "sequence_length": self._plan.companions.sequence_length})}
        )
        comment = _CONFIG_COMMENT.format(checkpoint=self.weights_folder(self._final))
        (directory / CONFIG_NAME).write_text(comment + dump_config(run))

    def read_back(self, directory: Path) -> NativeSource:
        """See ``Target``."""
        return NativeSource(directory)

    def _write_tensor(self, description: NativeTensor, tensor: Tensor, stage: int) -> list[dict[str, Any]]:
        digest = _facts(tensor).digest
        return [record | {"digest": digest} for record in super()._write_tensor(description, tensor, stage)]


def run_of(model: ModelConfig, run_dir: Path, *, precision: str) -> RunConfig:
    """Return a run that has this model, for what needs one and reads nothing else of it."""
    return RunConfig(
        run_dir=run_dir,
        model=model.model_copy(update={"pattern": model.layer_kinds}),
        data={"sources": {"unset": Path("unset")}, "sequence_length": 8192},
        optimizer={"lr": 1e-5},
        train={"steps": 1, "global_batch_size": 1, "precision": precision},
    )


def _facts(tensor: Tensor) -> TensorFacts:
    shape = tuple(tensor.shape)
    return TensorFacts(shape, str(tensor.dtype).removeprefix("torch."), f"{shard_digest(tensor, shape, (0,) * len(shape)):016x}")


def _tokenizer_of(run: RunConfig, run_dir: Path) -> TokenizerConfig | None:
    """The run's tokenizer. Where training kept a file, a copy of the definition alone, that is the original as long as both are the same:
    beside it may be other files."""
    kept, named = kept_tokenizer(run, run_dir), run.data.tokenizer
    if kept is None or kept.path.parent != run_dir or not (kept.path.is_file() and named.path.is_file()):
        return kept
    return named if named.path.read_bytes() == kept.path.read_bytes() else kept


def _find_checkpoint(path: Path) -> Path:
    if (path / HEADER).is_file():
        return path
    steps = complete_steps(path / CHECKPOINTS_NAME)
    if not steps:
        raise ValueError(
            f"{path} is neither a checkpoint (no {HEADER}) nor a run directory with one (no complete {CHECKPOINTS_NAME}/step_...)"
        )
    return path / CHECKPOINTS_NAME / step_name(steps[-1])
