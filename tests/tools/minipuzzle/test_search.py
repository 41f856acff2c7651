"""Memory, grid and solver: the paper's figures, brute force on small cases, and what cannot be searched."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pulp
import pytest

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.load import load_model
from megatron_hybrid.layout.parameters import num_parameters
from tools.minipuzzle.candidate import Candidate
from tools.minipuzzle.config import MemoryConfig, SearchConfig, load_minipuzzle
from tools.minipuzzle.latency import LatencyModel, LayerTimes
from tools.minipuzzle.memory import GIB, MemoryUse, model_memory
from tools.minipuzzle.rank import describe_solution
from tools.minipuzzle.scores import mean_ranks, synthetic_scores
from tools.minipuzzle.search import Estimate, damage_of, kept_layers, search_grid
from tools.minipuzzle.solver import solve

PAPER = Path(__file__).parents[3] / "examples/minipuzzle/nemotron_h_56b.yaml"
SOLVER_TIME_LIMIT_S = 250.0
"""For an optimum that a test asks to be proven, on whatever host; an idle core takes milliseconds, and seconds for the 56B."""
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


def is_subsequence(pattern: Sequence[str], of: Sequence[str]) -> bool:
    """Whether the items of one come in this order in the other."""
    rest = iter(of)
    return all(item in rest for item in pattern)


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
    return SearchConfig(
        **{
            "ffn_hidden_sizes": [32, 48, 64],
            "memory": {"limit_gib": 60_000 / GIB, "weight_bits": 16},
            "solver_time_limit_s": SOLVER_TIME_LIMIT_S,
            **options,
        }
    )


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
    # Activations are about a third of it, and depend on which kinds and widths are kept.
    search = small_search(memory={"limit_gib": 110_000 / GIB, "weight_bits": 16, "context_tokens": 64})
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
    solution = solve(SMALL, scores, search)
    solved = solution.estimate
    assert solution.is_proven and solution.least_damage == solved.damage
    assert solved.damage == pytest.approx(min(damage_of(scores, each) for each in free), rel=1e-5)
    assert solved.damage <= grid[0].damage * (1 + 1e-9)
    assert solved.memory_gib == pytest.approx(memory_gib(solved.candidate, search)) and solved.memory_gib <= search.memory.limit_gib


def test_estimated_memory_is_the_candidates_own() -> None:
    """Activations are those of the widest layer that a candidate keeps, not of the parent's."""
    wide = SMALL.model_copy(update={"ffn_hidden_size": 4096})
    search = SearchConfig(ffn_hidden_sizes=(64, 4096), hidden_sizes=(16, 32), mamba_num_heads=(4, 8), memory={"context_tokens": 64})
    scores = synthetic_scores(wide, 0)
    found = search_grid(wide, scores, search)
    for each in found:
        expected = model_memory(each.candidate.model(wide), search.memory).total_gib
        assert each.memory_gib == pytest.approx(expected, rel=1e-12), each.candidate.describe(wide)
    assert len({each.candidate for each in found}) == len(found)
    kinds = [set(each.candidate.pattern(wide)) for each in found]
    assert {"*"} in kinds and {"M"} in kinds and {"M", "*", "-"} in kinds


def test_the_parent_is_no_candidate() -> None:
    """Without a limit it would win, and nothing would be compressed."""
    scores = synthetic_scores(SMALL, 0)
    for estimate in [*search_grid(SMALL, scores, small_search(memory={})), solve(SMALL, scores, small_search(memory={})).estimate]:
        assert num_parameters(estimate.candidate.model(SMALL)) < num_parameters(SMALL)
    alone = small_search(attention=(2, 2), mlp=(3, 3), mamba=(3, 3), ffn_hidden_sizes=(64,))
    with pytest.raises(ValueError, match="the grid is empty: it allows the parent alone"):
        search_grid(SMALL, scores, alone)


def test_latency_is_a_limit_too() -> None:
    times = LayerTimes(32, 8, 8, fixed=1.0, attention=5.0, mamba=2.0, mlp_base=0.5, mlp_per_neuron=0.01)
    latency = LatencyModel("test", "fp32", 1, 1, (times,))
    search = small_search(memory={}, latency={"limit_ms": 9.0})
    scores = synthetic_scores(SMALL, 0)
    for estimate in [*search_grid(SMALL, scores, search, latency), solve(SMALL, scores, search, latency).estimate]:
        kinds = estimate.candidate.pattern(SMALL)
        expected = 1.0 + 5.0 * kinds.count("*") + 2.0 * kinds.count("M") + sum(0.5 + 0.01 * w for w in estimate.candidate.ffn_hidden_sizes)
        assert estimate.latency_ms == pytest.approx(expected) and expected <= 9.0


def test_the_56b_is_solved_to_the_optimum_and_no_worse_than_the_grid() -> None:
    config = load_minipuzzle(PAPER, [f"search.solver_time_limit_s={SOLVER_TIME_LIMIT_S}"])
    parent = preset(config.parent)
    scores = synthetic_scores(parent, config.seed)
    solution = solve(parent, scores, config.search)
    solved = solution.estimate
    assert solution.is_proven
    assert solved.damage <= search_grid(parent, scores, config.search)[0].damage
    assert solved.memory_gib <= 31.7 and is_subsequence(solved.candidate.pattern(parent), parent.pattern)


def test_an_impossible_budget_says_the_smallest_reachable() -> None:
    config = load_minipuzzle(PAPER, ["search.memory.limit_gib=20", f"search.solver_time_limit_s={SOLVER_TIME_LIMIT_S}"])
    parent = preset(config.parent)
    with pytest.raises(ValueError, match=r"limit_gib=20.0: the smallest that the grid reaches takes 22\.95 GiB at 1,048,576 tokens"):
        search_grid(parent, synthetic_scores(parent, 0), config.search)
    solution = solve(parent, synthetic_scores(parent, 0), config.search)
    assert solution.estimate is None and solution.is_proven
    assert describe_solution(solution, 1.0, 60.0) == "exact solver: no candidate fits the limits"


TIMES = LatencyModel("test", "fp32", 1, 1, (LayerTimes(32, 8, 8, fixed=1.0, attention=5.0, mamba=2.0, mlp_base=0.5, mlp_per_neuron=0.01),))


@pytest.mark.parametrize(
    ("memory_gib", "limit_ms", "pattern"),
    [
        (1e-6, None, r"limit_gib=1e-06: the smallest that the grid reaches takes (?P<gib>\S+) GiB at 64 tokens"),
        (None, 0.0001, r"limit_ms=0.0001: the fastest that the grid reaches takes (?P<ms>\S+) ms per step"),
        (1e-6, 0.0001, r"limit_gib=1e-06: .* takes (?P<gib>\S+) GiB .*, nor search.latency.limit_ms=0.0001: .* takes (?P<ms>\S+) ms"),
    ],
)
def test_the_smallest_reachable_is_reached(memory_gib: float | None, limit_ms: float | None, pattern: str) -> None:
    """What the message says, given as the limit, is enough for a candidate, and no more than enough."""

    def grid(gib: float | None, ms: float | None) -> list[Estimate]:
        memory = {"limit_gib": gib, "context_tokens": 64}
        return search_grid(SMALL, synthetic_scores(SMALL, 0), small_search(memory=memory, latency={"limit_ms": ms}), TIMES)

    with pytest.raises(ValueError, match="nothing fits search") as error:
        grid(memory_gib, limit_ms)
    said = {name: float(value) for name, value in re.search(pattern, str(error.value)).groupdict().items()}
    for name, value in said.items():
        (least,) = {len(each.candidate.layers) for each in grid(*((value, None) if name == "gib" else (None, value)))}
        assert least == 1
        with pytest.raises(ValueError, match="nothing fits search"):
            grid(*((0.998 * value, None) if name == "gib" else (None, 0.998 * value)))


def test_limits_that_fit_alone_but_not_together() -> None:
    # Without a context attention alone is small and slow here, an MLP layer alone large and fast.
    counts = {"attention": (0, 1), "mlp": (0, 1), "mamba": (0, 0), "ffn_hidden_sizes": (64,)}
    search = small_search(**counts, memory={"context_tokens": 1}, latency={"limit_ms": 3.0})
    sizes = {kind: model_memory(SMALL.model_copy(update={"pattern": kind}), search.memory).total for kind in "*-"}
    small, large = sorted(sizes, key=sizes.__getitem__)
    assert (small, large) == ("*", "-")
    search = search.model_copy(update={"memory": search.memory.model_copy(update={"limit_gib": (sizes[small] + 1) / GIB})})
    with pytest.raises(
        ValueError, match=r"at once: the fastest within the memory takes 6 ms per step, the smallest within the time \S+ GiB"
    ):
        search_grid(SMALL, synthetic_scores(SMALL, 0), search, TIMES)


def test_a_slack_that_is_too_narrow_says_what_the_largest_takes() -> None:
    search = small_search(memory={"limit_gib": 1.0, "slack_gib": 1e-5})
    message = r"within search.memory.slack_gib=1e-05 of search.memory.limit_gib=1.0: the largest that fits takes 0\.003588 GiB"
    with pytest.raises(ValueError, match=message):
        search_grid(SMALL, synthetic_scores(SMALL, 0), search)


def test_an_optimum_that_is_not_proven_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """CBC stopped with a solution in hand is optimal by PuLP's status; only the solution's status tells."""
    scores, search = synthetic_scores(SMALL, 0), small_search(memory={"limit_gib": 110_000 / GIB, "context_tokens": 64})
    proven = solve(SMALL, scores, search)
    whole = pulp.LpProblem.solve

    def stopped(program: pulp.LpProblem, solver: pulp.LpSolver) -> int:
        status = whole(program, solver)
        if solver.mip:
            program.sol_status = pulp.LpSolutionIntegerFeasible
        return status

    monkeypatch.setattr(pulp.LpProblem, "solve", stopped)
    solution = solve(SMALL, scores, search)
    assert solution.estimate == proven.estimate and not solution.is_proven
    assert 0 < solution.least_damage <= proven.estimate.damage * (1 + 1e-9)
    assert "within 60 s (search.solver_time_limit_s) has" in describe_solution(solution, 2 * proven.estimate.damage, 60.0)
    assert "not proven to be the optimum, whose damage is at least" in describe_solution(solution, 1.0, 60.0)


def test_a_solver_that_runs_out_of_time_is_told_from_one_that_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pulp.LpProblem.solve

    def stopped(program: pulp.LpProblem, solver: pulp.LpSolver) -> int:
        if not solver.mip:
            return whole(program, solver)
        assert solver.timeLimit == SOLVER_TIME_LIMIT_S
        program.sol_status = pulp.LpSolutionNoSolutionFound
        return pulp.LpStatusNotSolved

    monkeypatch.setattr(pulp.LpProblem, "solve", stopped)
    solution = solve(SMALL, synthetic_scores(SMALL, 0), small_search())
    assert solution.estimate is None and not solution.is_proven
    text = describe_solution(solution, 1.0, 1e-3)
    assert "no candidate within 0.001 s (search.solver_time_limit_s)" in text and "fits the limits" not in text


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
