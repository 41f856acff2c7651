"""Stage 1: forward passes over the parent on all ranks, and ``scores.json``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from megatron_hybrid.config import RunConfig
from megatron_hybrid.data.build import build_train_stream
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.substrate.launch import run_on_ranks
from tools.minipuzzle.config import MiniPuzzleConfig
from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.inputs import scoring_inputs
from tools.minipuzzle.parent import Parent, find_parent
from tools.minipuzzle.scores import Scores, check_scores, mean_ranks, save_scores


@dataclass(frozen=True)
class ScoreEntry:
    """What each rank does."""

    config: MiniPuzzleConfig

    def __call__(self, run: RunConfig, substrate: Substrate) -> ExitCode:
        """Score, and on rank 0 write the file."""
        parent = find_parent(self.config)
        scores = measure_scores(run, substrate, parent)
        if substrate.rank == 0:
            save_scores(scores, WorkFiles(self.config.work_dir).scores)
        return ExitCode.FINISHED


def score(config: MiniPuzzleConfig) -> int:
    """Run the stage on the ranks that the layout needs; return the exit code.

    Raises:
        ValueError: the parent, its text or the layout cannot be used.
    """
    parent = find_parent(config)
    return run_on_ranks(ScoreEntry(config), parent.forward_run(config.work_dir))


def measure_scores(run: RunConfig, substrate: Substrate, parent: Parent) -> Scores:
    """Return the parent's scores; collective, the same on every rank.

    Raises:
        ValueError: the checkpoint cannot be loaded, or its activations are not finite.
    """
    from megatron_hybrid.substrate.transformer_config import build_transformer_config
    from megatron_hybrid.tasks.frozen import load_frozen_chunks
    from tools.minipuzzle.forward import StageForward, read_micro_batches
    from tools.minipuzzle.importance import measure_layers, measure_widths

    options = parent.config.score
    (chunk,) = load_frozen_chunks(run, parent.weights, build_transformer_config(run, substrate), substrate)
    stage, stream = StageForward(chunk, run, substrate), build_train_stream(run)
    with _progress("score layers", options.layer_samples, substrate) as advance:
        batches = read_micro_batches(stream, options.layer_samples, run, substrate)
        mse_SL = measure_layers(stage, batches, options.layer_samples, run.model.num_layers, advance)
    axes = [axis for axis in options.axes if axis != "layers"]
    neurons, mamba, hidden = {}, {}, None
    if axes:
        with _progress("score widths", options.width_samples, substrate) as advance:
            widths = measure_widths(
                stage, read_micro_batches(stream, options.width_samples, run, substrate), options.width_samples, axes, advance
            )
        neurons, mamba, hidden = widths.neurons, widths.mamba, widths.hidden
    scores = Scores(
        checkpoint=parent.digest,
        model=run.model.architecture(),
        layer_mse=mse_SL.mean(0),
        layer_rank=mean_ranks(mse_SL),
        neurons=neurons,
        mamba=mamba,
        hidden=hidden,
        made_from=scoring_inputs(parent),
    )
    check_scores(scores, str(parent.weights))
    return scores


class _progress:
    """A bar on rank 0 that counts the samples of all data ranks."""

    def __init__(self, description: str, num_samples: int, substrate: Substrate) -> None:
        self._data_size = substrate.data_size
        self._bar = tqdm(total=num_samples, unit="sample", desc=description, disable=substrate.rank != 0, file=sys.stdout)

    def __enter__(self) -> Callable[[int], None]:
        return self._advance

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def _advance(self, num_samples: int) -> None:
        self._bar.update(min(num_samples * self._data_size, self._bar.total - self._bar.n))
