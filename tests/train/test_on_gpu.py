"""Training on a GPU: CUDA graphs change no bit of it, and neither does stopping and resuming; other libraries' kernels train alike.

MAMBA_DETERMINISTIC=1 python -m pytest tests/train/test_on_gpu.py
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.config import RunConfig
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.train.callback import Callback
from tests.installed import is_installed
from tests.runs import small_run, write_corpus
from tests.train.test_resume import assert_same_state
from tests.train.training import Outcome, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs, and the kernels of a GPU, need a GPU")

MODEL = {
    "pattern": "M-M*-M-",
    "hidden_size": 512,
    "ffn_hidden_size": 2048,
    "num_attention_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 64,
    "mamba_num_heads": 16,
    "mamba_head_dim": 64,
    "mamba_num_groups": 8,
    "mamba_state_dim": 128,
    "mamba_chunk_size": 128,
}


@dataclass
class GraphWatch(Callback):
    """Whether the step's micro-batches had been captured, and the gradient norm, after each step."""

    captured: list[bool] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)

    def after_step(self, trainer: Any, record: Any) -> None:
        self.captured.append(trainer.graph is not None and trainer.graph.is_captured)
        self.grad_norms.append(record.grad_norm)


def train_watched(run: RunConfig) -> tuple[Outcome, GraphWatch]:
    """Runs on the GPU's one rank. Whatever an optimizer shares with other steps is brought to the host: it crosses processes."""
    watch = GraphWatch()
    outcome = train(run, (watch,))
    outcome.weights = {name: weight.cpu() for name, weight in outcome.weights.items()}
    outcome.optimizer = [tensor.cpu() for tensor in outcome.optimizer]
    return outcome, watch


def gpu_run(
    folder: Path,
    run_dir: str,
    *,
    graphs: str = "on",
    recipe: str = "off",
    documents: bool = False,
    steps: int = 3,
    stop: int | None = None,
    deterministic: bool = True,
    kernels: dict[str, str] | None = None,
) -> RunConfig:
    return small_run(
        folder,
        run_dir=folder / run_dir,
        model={**MODEL},
        data={"sequence_length": 256, "reset_at_documents": documents},
        optimizer={"lr": 1e-3},
        train={"steps": steps, "global_batch_size": 4, "precision": "bf16", "exit_after_steps": stop},
        fp8={"recipe": recipe},
        kernels=kernels or {},
        runtime={"device": "cuda", "cuda_graphs": graphs, "deterministic": deterministic},
    )


@pytest.mark.parametrize("recipe, documents", [("off", False), ("off", True), ("delayed", False), ("current", False)])
def test_a_graph_changes_no_bit(recipe: str, documents: bool, tmp_path: Path, run_ranks: Any) -> None:
    """Three steps of four micro-batches: the first compiles the kernels, the others are replayed. Moments are made of all gradients."""
    write_corpus(tmp_path / "text", num_documents=400)
    runs = [gpu_run(tmp_path, graphs, graphs=graphs, recipe=recipe, documents=documents) for graphs in ("on", "off")]
    (replayed, with_graph), (launched, without) = (run_ranks(train_watched, 1, run, timeout_s=280)[0] for run in runs)
    assert with_graph.captured == [False, True, True] and without.captured == [False] * 3
    assert replayed.losses == launched.losses and with_graph.grad_norms == without.grad_norms
    assert_same_state(replayed, launched)


@pytest.mark.parametrize("recipe", ["off", "delayed"])
def test_resume_is_bitwise(recipe: str, tmp_path: Path, run_ranks: Any) -> None:
    """Twelve steps at once against six and six; the seventh is replayed in one and launched kernel by kernel in the other."""
    write_corpus(tmp_path / "text", num_documents=400)
    options = {"recipe": recipe, "steps": 12}
    whole, whole_watch = run_ranks(train_watched, 1, gpu_run(tmp_path, "whole", **options), timeout_s=280)[0]
    part, part_watch = run_ranks(train_watched, 1, gpu_run(tmp_path, "parts", **options, stop=6), timeout_s=280)[0]
    rest, rest_watch = run_ranks(train_watched, 1, gpu_run(tmp_path, "parts", **options), timeout_s=280)[0]
    assert part.exit_code == ExitCode.STOPPED and rest.exit_code == ExitCode.FINISHED
    assert rest.first_step == part.last_step == 6 and rest_watch.captured[:2] == [False, True]
    assert part.losses + rest.losses == whole.losses and part.hashes + rest.hashes == whole.hashes
    assert part_watch.grad_norms + rest_watch.grad_norms == whole_watch.grad_norms
    assert_same_state(rest, whole)


TRANSFORMER_ENGINE = dict.fromkeys(("rms_norm", "linear", "attention"), "transformer_engine")
MAMBA_SSM = {"mamba_core": "mamba_ssm"}


@pytest.mark.parametrize(
    "package, kernels, deterministic",
    [("transformer_engine_torch", TRANSFORMER_ENGINE, True), ("mamba_ssm", MAMBA_SSM, False)],
    ids=["transformer_engine", "mamba_ssm"],
)
def test_other_libraries_kernels_train_alike(
    package: str, kernels: dict[str, str], deterministic: bool, tmp_path: Path, run_ranks: Any
) -> None:
    """The same losses as with ours, as far as bf16 goes; within CUDA graphs too."""
    if not is_installed(package):
        pytest.skip(f"{package} is not installed")
    write_corpus(tmp_path / "text", num_documents=400)
    runs = [gpu_run(tmp_path, name, kernels=choice, deterministic=deterministic) for name, choice in (("ours", {}), ("theirs", kernels))]
    (ours, our_watch), (theirs, watch) = (run_ranks(train_watched, 1, run, timeout_s=280)[0] for run in runs)
    assert watch.captured == [False, True, True]
    assert theirs.losses == pytest.approx(ours.losses, rel=5e-3)
    # of all gradients together, before the update has moved the weights apart
    assert watch.grad_norms[0] == pytest.approx(our_watch.grad_norms[0], rel=5e-3)
    for ours_of, theirs_of in zip(ours.optimizer, theirs.optimizer, strict=True):
        assert ours_of.count_nonzero() == 0 or theirs_of.count_nonzero() > 0, "a weight that got a gradient got none"
