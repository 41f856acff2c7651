"""Memory, grid and solver: the paper's figures, brute force on small cases, and what cannot be searched."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.load import load_model
from megatron_hybrid.layout.parameters import num_parameters
from tools.minipuzzle.candidate import Candidate
from tools.minipuzzle.config import MemoryConfig, SearchConfig, load_minipuzzle
from tools.minipuzzle.latency import LatencyModel, LayerTimes
from tools.minipuzzle.memory import GIB, MemoryUse, model_memory
from tools.minipuzzle.scores import mean_ranks, synthetic_scores
from tools.minipuzzle.search import damage_of, is_subsequence, kept_layers, search_grid
from tools.minipuzzle.solver import solve

PAPER = Path(__file__).parents[3] / "examples/minipuzzle/nemotron_h_56b.yaml"
SMALL = ModelConfig(
    pattern="M-*M--*M",
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mamba_num_heads=8,
    mamba_head_dim=8,
    mamba_num_groups=2,
    mamba_state_dim=16,
    vocab_size=128,
)
FP4 = MemoryConfig(weight_bits=4.5, kv_bits=4.5, context_tokens=2**20)


def preset(name: str) -> ModelConfig:
    return load_model(name)[0]


def test_memory_is_the_papers() -> None:
    assert round(model_memory(preset("nemotron-h-56b"), FP4).weights / GIB, 1) == 29.5
    parts = model_memory(preset("nemotron-h-47b"), FP4)
    assert round(parts.weights / GIB, 2) == 24.51 and parts.kv_cache / GIB == 5.625 and round(parts.ssm_state / GIB, 2) == 0.70
    assert 30.3 < parts.total_gib < 31.7
    # With 8 bits per value in the cache it would not have fitted.
    assert model_memory(preset("nemotron-h-47b"), FP4.model_copy(update={"kv_bits": 8.5})).total_gib > 31.7


def test_memory_counts_every_parameter_and_state() -> None:
    setting = MemoryConfig(weight_bits=8, kv_bits=8, ssm_state_bits=32, activation_bits=16, context_tokens=100, batch_size=3)
    use = model_memory(SMALL, setting)
    assert use.weights == num_parameters(SMALL)
    assert use.kv_cache == 2 * (2 * 2 * 8) * 100 * 3
    assert use.ssm_state == 3 * (64 * 16) * 4 * 3
    assert use.conv_state == 3 * 3 * (64 + 2 * 2 * 16) * 2 * 3
    assert use + MemoryUse(weights=5.0) == MemoryUse(use.weights + 5, use.kv_cache, use.ssm_state, use.conv_state, use.activations)
    narrower = SMALL.model_copy(update={"pattern": "-", "ffn_hidden_size": 48})
    whole = SMALL.model_copy(update={"pattern": "-"})
    assert model_memory(whole, setting).weights - model_memory(narrower, setting).weights == 2 * 32 * (64 - 48)
    mixed = SMALL.model_copy(update={"pattern": "--", "ffn_hidden_size": (64, 48)})
    assert model_memory(mixed, setting).weights == num_parameters(mixed)


def test_the_papers_search_gives_a_few_hundred_candidates() -> None:
    config = load_minipuzzle(PAPER)
    parent = preset(config.parent)
    found = search_grid(parent, synthetic_scores(parent, config.seed), config.search)
    assert 200 < len(found) < 800
    for estimate in found:
        assert is_subsequence(estimate.candidate.pattern(parent), parent.pattern)
        assert 31.3 <= estimate.memory_gib <= 31.7
        assert abs(model_memory(estimate.candidate.model(parent), config.search.memory).total_gib - estimate.memory_gib) < 1e-9
    released = preset("nemotron-h-47b")
    counts = {(kinds.count("M"), kinds.count("-"), kinds.count("*")) for kinds in (each.candidate.pattern(parent) for each in found)}
    assert tuple(released.pattern.count(kind) for kind in "M-*") == (45, 48, 5) and (45, 48, 5) in counts and (44, 49, 5) in counts


def test_the_grid_keeps_the_best_of_each_kind() -> None:
    scores = synthetic_scores(SMALL, 3)
    scores.layer_rank[:] = [7, 0, 1, 2, 6, 5, 3, 4]
    assert kept_layers(scores, {"M": 2, "-": 2, "*": 1}) == (0, 4, 5, 6, 7)


def small_search(**options) -> SearchConfig:
    return SearchConfig(**{"ffn_hidden_sizes": [32, 48, 64], "memory": {"limit_gib": 60_000 / GIB, "weight_bits": 16}, **options})


def memory_gib(candidate: Candidate, search: SearchConfig) -> float:
    return model_memory(candidate.model(SMALL), search.memory).total_gib


def all_choices(width_sets) -> list[Candidate]:
    found = []
    for number in range(1, SMALL.num_layers + 1):
        for layers in itertools.combinations(range(SMALL.num_layers), number):
            num_mlp = sum(SMALL.layer_kinds[layer] == "-" for layer in layers)
            found += [Candidate(layers, widths, 8, 8, 32) for widths in width_sets(num_mlp)]
    return found


@pytest.mark.parametrize("seed", range(4))
def test_grid_and_solver_equal_brute_force(seed: int) -> None:
    # A small context keeps activations, which the solver takes as the parent's, from mattering.
    search = small_search(memory={"limit_gib": 75_000 / GIB, "weight_bits": 16, "context_tokens": 16, "prefill_chunk_tokens": 1})
    scores = synthetic_scores(SMALL, seed)
    scores.layer_rank[:] = mean_ranks(scores.layer_mse[None])
    grid = search_grid(SMALL, scores, search)
    fitting = [
        each
        for each in all_choices(lambda n: [(width,) * n for width in (32, 48, 64)] if n else [()])
        if memory_gib(each, search) <= search.memory.limit_gib
    ]
    best = min(fitting, key=lambda candidate: damage_of(scores, candidate))
    # mse decides the rank here, so the best of each kind are the best at all: the grid's best is the best uniform one.
    assert grid[0].damage == pytest.approx(damage_of(scores, best), rel=1e-9)
    free = [
        each
        for each in all_choices(lambda n: list(itertools.product((32, 48, 64), repeat=n)))
        if memory_gib(each, search) <= search.memory.limit_gib
    ]
    solved = solve(SMALL, scores, search)
    assert solved.damage == pytest.approx(min(damage_of(scores, each) for each in free), rel=1e-5)
    assert solved.damage <= grid[0].damage * (1 + 1e-9)
    assert memory_gib(solved.candidate, search) <= search.memory.limit_gib


def test_latency_is_a_limit_too() -> None:
    times = LayerTimes(32, 8, 8, fixed=1.0, attention=5.0, mamba=2.0, mlp_base=0.5, mlp_per_neuron=0.01)
    latency = LatencyModel("test", "fp32", 1, 1, (times,))
    search = small_search(memory={}, latency={"limit_ms": 9.0})
    scores = synthetic_scores(SMALL, 0)
    for estimate in [*search_grid(SMALL, scores, search, latency), solve(SMALL, scores, search, latency)]:
        kinds = estimate.candidate.pattern(SMALL)
        expected = 1.0 + 5.0 * kinds.count("*") + 2.0 * kinds.count("M") + sum(0.5 + 0.01 * w for w in estimate.candidate.ffn_hidden_sizes)
        assert estimate.latency_ms == pytest.approx(expected) and expected <= 9.0


def test_the_56b_is_solved_in_seconds_and_no_worse_than_the_grid() -> None:
    config = load_minipuzzle(PAPER)
    parent = preset(config.parent)
    scores = synthetic_scores(parent, config.seed)
    solved = solve(parent, scores, config.search)
    assert solved.damage <= search_grid(parent, scores, config.search)[0].damage
    assert solved.memory_gib <= 31.7 and is_subsequence(solved.candidate.pattern(parent), parent.pattern)


def test_an_impossible_budget_says_the_smallest_reachable() -> None:
    config = load_minipuzzle(PAPER, ["search.memory.limit_gib=20"])
    parent = preset(config.parent)
    with pytest.raises(ValueError, match=r"limit_gib=20.0: the smallest that the grid reaches takes 22\.94 GiB at 1,048,576 tokens"):
        search_grid(parent, synthetic_scores(parent, 0), config.search)
    assert solve(parent, synthetic_scores(parent, 0), config.search) is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attention": [0, 3]}, r"search.attention=\[0, 3\] asks for up to 3 layers, the parent has 2"),
        ({"ffn_hidden_sizes": [32, 128]}, r"search.ffn_hidden_sizes=\[32, 128\] must lie between 1 and the parent's 64"),
        ({"mamba_num_heads": [3]}, r"search.mamba_num_heads=\[3\] are no multiples of mamba_num_groups=2"),
    ],
)
def test_a_grid_beyond_the_parent_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search_grid(SMALL, synthetic_scores(SMALL, 0), small_search(**options))


def test_widths_that_were_not_scored_are_refused() -> None:
    scores = synthetic_scores(SMALL, 0)
    scores.neurons.clear()
    with pytest.raises(ValueError, match="was not scored; add ffn to score.axes"):
        search_grid(SMALL, scores, small_search())


def test_ranks_are_averaged_over_samples() -> None:
    np.testing.assert_array_equal(mean_ranks(np.array([[3.0, 1.0, 2.0], [5.0, 6.0, 7.0]])), [1.0, 0.5, 1.5])


def test_a_candidate_survives_json() -> None:
    candidate = Candidate((0, 1, 4), (48, 32), 8, 8, 32)
    assert Candidate.from_json(candidate.to_json(), SMALL, "here") == candidate
    for changes, message in (
        ({"layers": [1, 0]}, "ascending"),
        ({"ffn_hidden_sizes": [48]}, "2 MLP layers are kept, but 1"),
        ({"mamba_num_heads": 3}, "no multiple"),
        ({"hidden_size": 64}, "between 1 and the parent's 32"),
    ):
        with pytest.raises(ValueError, match=message):
            Candidate.from_json(candidate.to_json() | changes, SMALL, "here")
