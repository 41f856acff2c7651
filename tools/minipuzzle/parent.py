"""The model to compress: where it is, and the runs that go over it. Imports no torch unless weights are looked at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megatron_hybrid.config import DataConfig, ModelConfig, RunConfig, ValidationConfig, load_config
from megatron_hybrid.config.errors import explain, refuse
from megatron_hybrid.config.load import load_model, preset_names
from megatron_hybrid.config.run_directory import CONFIG_NAME, kept_tokenizer
from tools.minipuzzle.config import BatchConfig, MiniPuzzleConfig
from tools.minipuzzle.scores import checkpoint_digest

if TYPE_CHECKING:
    from megatron_hybrid.convert.native import NativeSource


@dataclass(frozen=True)
class Parent:
    """A model with weights in a checkpoint, or a preset without."""

    model: ModelConfig
    checkpoint: Path | None
    """None for a preset."""
    config: MiniPuzzleConfig

    @property
    def weights(self) -> Path:
        """The checkpoint.

        Raises:
            ValueError: there is none.
        """
        if self.checkpoint is None:
            raise ValueError(f"parent: {self.config.parent} is a preset and has no weights; name a run directory or a checkpoint")
        return self.checkpoint

    @cached_property
    def digest(self) -> str:
        """A digest of the weights."""
        from megatron_hybrid.convert.native import NativeSource

        return weights_digest(NativeSource(self.weights))

    @property
    def batch(self) -> BatchConfig:
        """How ranks cut their work.

        Raises:
            ValueError: the compression does not say.
        """
        if self.config.batch is None:
            raise ValueError(
                "missing option 'batch': every stage but a search without weights runs the model; give batch.global_batch_size"
            )
        return self.config.batch

    @cached_property
    def run(self) -> RunConfig | None:
        """The run that trained it, where the checkpoint stands in its directory."""
        file = self.weights.parent.parent / CONFIG_NAME
        return load_config(file) if file.is_file() else None

    @cached_property
    def data(self) -> DataConfig:
        """The text of scoring and distillation.

        Raises:
            ValueError: neither the compression nor the parent names any, or the two have different tokenizers.
        """
        run = self.run
        data = self.config.data
        own_tokenizer = None if run is None else kept_tokenizer(run, self.weights.parent.parent)
        if data is None:
            if run is None:
                raise ValueError(f"{self.weights} stands alone and names no text; give data.sources and data.sequence_length")
            return run.data.model_copy(update={"tokenizer": own_tokenizer})
        if data.tokenizer is None:
            return data.model_copy(update={"tokenizer": own_tokenizer})
        if own_tokenizer is not None:
            from megatron_hybrid.data.tokenizer import load_tokenizer

            ours, its = (load_tokenizer(each.kind, each.path, each.eod_token).fingerprint for each in (data.tokenizer, own_tokenizer))
            if ours != its:
                raise ValueError(
                    f"data.tokenizer ({data.tokenizer.path}) is another tokenizer than the parent's ({own_tokenizer.path}): the student "
                    "would learn other tokens than its teacher knows; use the parent's, and corpora made by it"
                )
        return data

    @property
    def validation(self) -> ValidationConfig:
        """The text that candidates and results are measured on.

        Raises:
            ValueError: there is none.
        """
        validation = self.config.validation or (self.run.validation if self.run else None)
        if validation is None or not validation.sources:
            raise ValueError("validation.sources is empty: candidates are ranked, and results measured, on held-out text; name some")
        return validation

    def forward_run(self, run_dir: Path, model: ModelConfig | None = None) -> RunConfig:
        """Return a run for forward passes over a model (the parent unless given).

        It keeps no activations, so that there is nothing for sequence parallelism and interleaving to gain; both are left out.

        Raises:
            ValueError: the layout does not divide the model, or options are missing.
        """
        parallel = self.config.parallel.model_copy(update={"sequence_parallel": False, "virtual_pipeline": 1, "stages": None})
        return self.build_run(run_dir, model or self.model, 1, parallel=parallel.model_dump(), optimizer={"lr": 1e-5})

    def timing_run(self, run_dir: Path) -> RunConfig:
        """Return a run for timing decoding: as generation runs, without deterministic algorithms.

        Raises:
            ValueError: as ``forward_run``.
        """
        run = self.forward_run(run_dir)
        return run.model_copy(update={"runtime": run.runtime.model_copy(update={"deterministic": False})})

    def build_run(self, run_dir: Path, model: ModelConfig, steps: int, **options: Any) -> RunConfig:
        """Return a run over the compression's text, with its batch, layout and device.

        Raises:
            ValueError: the layout does not divide the model, or options are missing.
        """
        config = self.config
        sections = {
            "run_dir": run_dir,
            "seed": config.seed,
            "model": model.model_dump() | {"pattern": model.layer_kinds},
            "parallel": config.parallel.model_dump(),
            "data": self.data.model_dump(),
            "train": self.batch.model_dump() | {"steps": steps},
            "validation": self.validation.model_dump(),
            "logging": config.logging.model_dump(),
            "kernels": config.kernels.model_dump(),
            "runtime": config.runtime.model_dump(),
            **options,
        }
        try:
            return RunConfig.model_validate(sections)
        except ValidationError as error:
            raise refuse(f"the options for a run of {model.layer_kinds} in {run_dir}", explain(error, RunConfig)) from None


def weights_digest(source: NativeSource) -> str:
    """Return a digest of a checkpoint's weights, the same in whatever layout they were written."""
    from megatron_hybrid.checkpoint.manifest import Manifest

    # The source knows which of the checkpoint's tensors are weights.
    tensors = Manifest.read(source.path).tensors
    return checkpoint_digest({name: facts.digest for name, facts in tensors.items() if name in source.specs})


def find_parent(config: MiniPuzzleConfig) -> Parent:
    """Return the parent that the compression names.

    Raises:
        ValueError: it is neither a preset, nor a run directory, nor a checkpoint that is sound; or its MLP layers differ in width.
    """
    if config.parent in preset_names():
        return Parent(load_model(config.parent)[0], None, config)
    from megatron_hybrid.convert.native import NativeSource

    path = Path(config.parent)
    if not path.exists():
        raise ValueError(
            f"parent: {config.parent} is neither a run directory, nor a checkpoint, nor a preset ({', '.join(preset_names())})"
        )
    source = NativeSource(path)
    if not isinstance(source.model.ffn_hidden_size, int):
        # The grid asks for one width of all MLP layers, and its arithmetic knows one whole width.
        narrowest, widest = min(source.model.ffn_hidden_size), max(source.model.ffn_hidden_size)
        raise ValueError(
            f"parent: the MLP layers of {config.parent} are {narrowest} to {widest} wide; only a parent with one width can be compressed"
        )
    return Parent(source.model, source.path, config)
