"""Scores say what they are defined as, by brute force; and no layout changes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hybrid.data.build import build_train_stream
from megatron_hybrid.substrate.groups import initialize, shutdown
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from megatron_hybrid.tasks.frozen import load_frozen_chunks
from tests.tools.minipuzzle.small import PATTERN, compression
from tools.minipuzzle.config import MiniPuzzleConfig
from tools.minipuzzle.forward import StageForward, read_micro_batches
from tools.minipuzzle.importance import sweep
from tools.minipuzzle.parent import find_parent
from tools.minipuzzle.score import measure_scores
from tools.minipuzzle.scores import Scores, load_scores, mean_ranks, require_same_checkpoint, save_scores

LAYOUTS = {
    "tp2": {"tensor": 2},
    "tp2-sp": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
    "dp2": {"data": 2},
    "tp2-pp2": {"tensor": 2, "pipeline": 2},
}


def score_in(config: MiniPuzzleConfig) -> Scores:
    """Score; runs on every rank."""
    parent = find_parent(config)
    run = parent.forward_run(config.work_dir)
    substrate = initialize(run)
    scores = measure_scores(run, substrate, parent)
    shutdown(substrate)
    return scores


def by_brute_force(config: MiniPuzzleConfig) -> dict:
    """The definitions, one full sweep for every layer; and how many layer passes the one sweep takes. Runs on one rank."""
    parent = find_parent(config)
    run = parent.forward_run(config.work_dir)
    substrate = initialize(run)
    (chunk,) = load_frozen_chunks(run, parent.weights, build_transformer_config(run, substrate), substrate)
    stage, layers = StageForward(chunk, run, substrate), list(chunk.decoder.layers)
    stream = build_train_stream(run)
    mse, neurons, heads = [], [], []
    with torch.no_grad():
        for index in range(config.score.width_samples):
            sample = {name: torch.from_numpy(value)[None] for name, value in stream[index].items()}
            sequence = chunk.describe_sequence(sample["tokens"].shape[1], sample["segment_ids"])

            def last(without: int | None) -> torch.Tensor:
                hidden = chunk.embedding(sample["tokens"])  # noqa: B023
                for number, layer in enumerate(layers):
                    if number != without:
                        hidden = layer(hidden, sequence)  # noqa: B023
                return chunk.decoder.final_norm(hidden)

            if index < config.score.layer_samples:
                mse.append([float((last(number) - last(None)).square().mean()) for number in range(len(layers))])
            hidden = chunk.embedding(sample["tokens"])
            first_mlp, first_mamba = layers[1], layers[0]
            projected = first_mamba.mixer.in_proj(hidden)
            x_LBI = projected[..., run.model.mamba_inner_size : 2 * run.model.mamba_inner_size]
            heads.append(x_LBI.abs().mean(0)[0].reshape(run.model.mamba_num_heads, -1).double().numpy())
            inner = first_mlp.mlp.linear_fc1(first_mamba(hidden, sequence))
            neurons.append((torch.relu(inner) ** 2).mean(0)[0].double().numpy())
        calls = [0]
        handles = [layer.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1)) for layer in layers]
        sweep(stage, next(read_micro_batches(stream, 2, run, substrate)))
        for handle in handles:
            handle.remove()
    shutdown(substrate)
    return {
        "mse": np.array(mse),
        "neurons": np.sqrt(np.square(neurons).sum(0)),
        "heads": np.sqrt(np.square(heads).sum(0)),
        "layer passes": calls[0],
    }


@pytest.fixture(scope="module")
def one_rank(parent_folder: Path, rank_pool) -> Scores:
    return rank_pool.run(score_in, 1, compression(parent_folder))[0]


def test_scores_are_what_they_are_defined_as(parent_folder: Path, one_rank: Scores, run_ranks) -> None:
    (expected,) = run_ranks(by_brute_force, 1, compression(parent_folder))
    np.testing.assert_allclose(one_rank.layer_mse, expected["mse"].mean(0), rtol=1e-4)
    np.testing.assert_array_equal(one_rank.layer_rank, mean_ranks(expected["mse"]))
    np.testing.assert_allclose(one_rank.neurons[1], expected["neurons"], rtol=1e-4)
    np.testing.assert_allclose(one_rank.mamba[0], expected["heads"], rtol=1e-4)
    assert sorted(one_rank.neurons) == [1, 4, 6] and sorted(one_rank.mamba) == [0, 2, 5]
    num_layers = len(PATTERN)
    # N + 1 full sweeps would take N (N + 1) passes.
    assert expected["layer passes"] == num_layers * (num_layers + 1) // 2


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_layout_changes_scores(layout: dict, parent_folder: Path, one_rank: Scores, run_ranks) -> None:
    world_size = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)
    for scores in run_ranks(score_in, world_size, compression(parent_folder, parallel=layout)):
        np.testing.assert_allclose(scores.layer_mse, one_rank.layer_mse, rtol=1e-4)
        np.testing.assert_array_equal(scores.layer_rank, one_rank.layer_rank)
        for name in ("neurons", "mamba"):
            of_layout, expected = getattr(scores, name), getattr(one_rank, name)
            assert of_layout.keys() == expected.keys()
            for layer in expected:
                np.testing.assert_allclose(of_layout[layer], expected[layer], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(scores.hidden, one_rank.hidden, rtol=1e-4)


def test_scores_survive_their_files(tmp_path: Path, one_rank: Scores) -> None:
    save_scores(one_rank, tmp_path / "scores.json")
    read = load_scores(tmp_path / "scores.json")
    assert read.checkpoint == one_rank.checkpoint and read.model == one_rank.model
    np.testing.assert_array_equal(read.layer_rank, one_rank.layer_rank)
    np.testing.assert_array_equal(read.neurons[4], one_rank.neurons[4])
    np.testing.assert_array_equal(read.hidden, one_rank.hidden)
    require_same_checkpoint(read, one_rank.checkpoint, tmp_path)
    with pytest.raises(ValueError, match="scores another checkpoint"):
        require_same_checkpoint(read, "0" * 16, tmp_path / "scores.json")


def test_scores_that_are_not_numbers_are_refused(tmp_path: Path, one_rank: Scores) -> None:
    one_rank.neurons[4][7] = np.nan
    save_scores(one_rank, tmp_path / "scores.json")
    one_rank.neurons[4][7] = 1.0
    with pytest.raises(ValueError, match=r"neurons of layer 4 at \[7\] is nan"):
        load_scores(tmp_path / "scores.json")
