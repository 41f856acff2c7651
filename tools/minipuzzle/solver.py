"""The exact optimum of the estimated damage: an integer program, with a width of its own for every MLP layer (after Puzzle, 2411.19146).

A binary variable for every layer that is kept, and for an MLP layer one for every width it may have; minimise the damage of ``search``
under the same limits and counts. Every point of the grid is a solution of this program, so its optimum is never worse than the grid's.
CBC solves it to proven optimality within a relative gap; widths that all layers share are tried one after another.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.layout.pattern import ATTENTION, MAMBA, MLP
from tools.minipuzzle.candidate import Candidate
from tools.minipuzzle.config import SearchConfig
from tools.minipuzzle.latency import LatencyModel
from tools.minipuzzle.memory import GIB
from tools.minipuzzle.scores import Scores
from tools.minipuzzle.search import (
    Estimate,
    LayerCosts,
    Widths,
    check_grid,
    count_range,
    damage_of,
    ffn_choices,
    layer_costs,
    pruned_energy,
    width_choices,
)

RELATIVE_GAP = 1e-6
TIME_LIMIT_S = 60


@dataclass(frozen=True)
class _Choice:
    """One way to keep a layer."""

    layer: int
    kind: str
    width: int
    """Of an MLP layer; 0 for others."""
    gain: float
    """Damage that is avoided."""


def solve(parent: ModelConfig, scores: Scores, search: SearchConfig, latency: LatencyModel | None = None) -> Estimate | None:
    """Return the candidate of least estimated damage, or None where no choice fits the limits.

    Args:
        parent: the model to compress.
        scores: of its parts.
        search: widths, counts and targets; the slack under the memory limit is not asked for, an optimum fills it by itself.
        latency: measured times; needed with a limit on latency.

    Raises:
        ValueError: as ``search_grid``, or PuLP is not installed.
    """
    check_grid(parent, scores, search)
    solutions = []
    for widths in width_choices(parent, search):
        costs = layer_costs(parent, widths, search, latency)
        candidate = _solve_widths(parent, scores, search, widths, costs)
        if candidate is not None:
            taken = {name: _cost(cost, candidate, parent) for name, cost in costs.items()}
            solutions.append(Estimate(candidate, damage_of(scores, candidate), taken["memory"] / GIB, taken.get("latency")))
    return min(solutions, key=lambda estimate: estimate.damage, default=None)


def _solve_widths(
    parent: ModelConfig, scores: Scores, search: SearchConfig, widths: Widths, costs: dict[str, LayerCosts]
) -> Candidate | None:
    try:
        import pulp
    except ImportError:
        raise ValueError("the exact solver needs PuLP: install the extra 'minipuzzle', or set search.solver=false") from None
    choices = [
        _Choice(layer, kind, width, mse * (1.0 - pruned_energy(scores, layer, width, widths)))
        for layer, (kind, mse) in enumerate(zip(scores.kinds, scores.layer_mse, strict=True))
        for width in (ffn_choices(parent, search) if kind == MLP else (0,))
    ]
    program = pulp.LpProblem("minipuzzle", pulp.LpMaximize)
    variables = [program.add_variable(f"layer_{choice.layer}_{choice.width}", cat="Binary") for choice in choices]
    # Scaled, because a solver's tolerances are absolute.
    scale = 1.0 / max(sum(scores.layer_mse), 1e-300)
    program += pulp.lpSum(scale * choice.gain * variable for choice, variable in zip(choices, variables, strict=True))
    for layer in {choice.layer for choice in choices if choice.kind == MLP}:
        program += pulp.lpSum(variable for choice, variable in zip(choices, variables, strict=True) if choice.layer == layer) <= 1
    for kind in (ATTENTION, MLP, MAMBA):
        of_kind = [variable for choice, variable in zip(choices, variables, strict=True) if choice.kind == kind]
        first, last = count_range(parent, search, kind)
        program += pulp.lpSum(of_kind) >= first
        program += pulp.lpSum(of_kind) <= last
    program += pulp.lpSum(variables) >= 1
    for cost in costs.values():
        if cost.limit is not None:
            taken = pulp.lpSum(
                _layer_cost(cost, choice.kind, choice.width) / cost.limit * variable
                for choice, variable in zip(choices, variables, strict=True)
            )
            program += taken <= 1.0 - cost.fixed / cost.limit
    status = program.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=RELATIVE_GAP, timeLimit=TIME_LIMIT_S))
    if pulp.LpStatus[status] != "Optimal":
        return None
    kept = sorted(
        (choice for choice, variable in zip(choices, variables, strict=True) if variable.value() > 0.5), key=lambda choice: choice.layer
    )
    ffn = tuple(choice.width for choice in kept if choice.kind == MLP)
    return Candidate(tuple(choice.layer for choice in kept), ffn, widths.mamba_num_heads, widths.mamba_head_dim, widths.hidden_size)


def _layer_cost(cost: LayerCosts, kind: str, width: int) -> float:
    return cost.mlp(width) if kind == MLP else {ATTENTION: cost.attention, MAMBA: cost.mamba}[kind]


def _cost(cost: LayerCosts, candidate: Candidate, parent: ModelConfig) -> float:
    kinds = candidate.pattern(parent)
    others = sum(_layer_cost(cost, kind, 0) for kind in kinds if kind != MLP)
    return cost.fixed + others + sum(cost.mlp(width) for width in candidate.ffn_hidden_sizes)
