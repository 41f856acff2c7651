"""The exact optimum of the estimated damage: an integer program, with a width of its own for every MLP layer (after Puzzle, 2411.19146).

A binary variable for every layer that is kept, and for an MLP layer one for every width it may have; minimise the damage of ``search``
under the same limits and counts. Every point of the grid is a solution of this program, so its optimum is never worse than the grid's.
Activations, of which the largest layer's count, are one more variable, at least what each kept layer holds. CBC solves it to proven
optimality within a relative gap, or stops at a time limit with the best it has; widths that all layers share are tried one after another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    is_whole,
    layer_costs,
    pruned_energy,
    width_choices,
)

if TYPE_CHECKING:
    import pulp

RELATIVE_GAP = 1e-6


@dataclass(frozen=True)
class Solution:
    """What the integer programs came to."""

    estimate: Estimate | None
    """The candidate of least estimated damage that was found; None where there is none."""
    is_proven: bool
    """Whether nothing better is left, or, without a candidate, nothing at all; else a program was stopped at its time limit."""
    least_damage: float
    """No candidate has less damage: what was found if that is proven, else a bound."""


@dataclass(frozen=True)
class _Choice:
    """One way to keep a layer."""

    layer: int
    kind: str
    width: int
    """Of an MLP layer; 0 for others."""
    gain: float
    """Damage that is avoided."""


def solve(parent: ModelConfig, scores: Scores, search: SearchConfig, latency: LatencyModel | None = None) -> Solution:
    """Return the candidate of least estimated damage.

    Args:
        parent: the model to compress; it is no candidate itself.
        scores: of its parts.
        search: widths, counts, targets and the time for each integer program; the slack under the memory limit is not asked for, an
            optimum fills it by itself.
        latency: measured times; needed with a limit on latency.

    Raises:
        ValueError: as ``search_grid``, or PuLP is not installed.
    """
    check_grid(parent, scores, search)
    solutions = []
    for widths in width_choices(parent, search):
        costs = layer_costs(parent, widths, search, latency)
        candidate, is_proven, bound = _solve_widths(parent, scores, search, widths, costs)
        estimate = None
        if candidate is not None:
            ffn = iter(candidate.ffn_hidden_sizes)
            layers = [(kind, next(ffn) if kind == MLP else 0) for kind in candidate.pattern(parent)]
            taken = {name: cost.of_layers(layers) for name, cost in costs.items()}
            estimate = Estimate(candidate, damage_of(scores, candidate), taken["memory"] / GIB, taken.get("latency"))
        solutions.append(Solution(estimate, is_proven, estimate.damage if estimate is not None and is_proven else bound))
    best = min((each.estimate for each in solutions if each.estimate is not None), key=lambda each: each.damage, default=None)
    least = min(each.least_damage for each in solutions)
    # A program that was stopped cannot win any more where its bound is no better than what another one found.
    is_proven = all(each.is_proven or (best is not None and each.least_damage >= best.damage) for each in solutions)
    return Solution(best, is_proven, best.damage if is_proven and best is not None else least)


def _solve_widths(
    parent: ModelConfig, scores: Scores, search: SearchConfig, widths: Widths, costs: dict[str, LayerCosts]
) -> tuple[Candidate | None, bool, float]:
    """The best candidate, whether that is proven, and a bound: no candidate has less damage."""
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
    if is_whole(parent, widths):
        whole = [variable for choice, variable in zip(choices, variables, strict=True) if choice.width in (0, parent.ffn_hidden_size)]
        program += pulp.lpSum(whole) <= parent.num_layers - 1
    for name, cost in costs.items():
        if cost.limit is not None:
            shared = program.add_variable(f"shared_{name}", lowBound=0.0)
            for layer in range(parent.num_layers):
                program += shared >= pulp.lpSum(
                    cost.shared(choice.kind, choice.width) / cost.limit * variable
                    for choice, variable in zip(choices, variables, strict=True)
                    if choice.layer == layer
                )
            taken = pulp.lpSum(
                cost.layer(choice.kind, choice.width) / cost.limit * variable for choice, variable in zip(choices, variables, strict=True)
            )
            program += taken + shared <= 1.0 - cost.fixed / cost.limit
    status = program.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=RELATIVE_GAP, timeLimit=search.solver_time_limit_s))
    # PuLP's status is "optimal" also where CBC was stopped with a solution in hand; the status of the solution tells.
    found, is_proven = status == pulp.LpStatusOptimal, program.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionInfeasible)
    candidate = None
    if found:
        kept = sorted(
            (choice for choice, variable in zip(choices, variables, strict=True) if variable.value() > 0.5), key=lambda choice: choice.layer
        )
        ffn = tuple(choice.width for choice in kept if choice.kind == MLP)
        layers = tuple(choice.layer for choice in kept)
        candidate = Candidate(layers, ffn, widths.mamba_num_heads, widths.mamba_head_dim, widths.hidden_size)
    return candidate, is_proven, math.inf if is_proven else sum(scores.layer_mse) - _relaxed_gain(program) / scale


def _relaxed_gain(program: pulp.LpProblem) -> float:
    """The objective's bound: the optimum where layers may be kept in part; infinite where that cannot be had either."""
    import pulp

    program.solve(pulp.PULP_CBC_CMD(msg=False, mip=False))
    return pulp.value(program.objective) if program.sol_status == pulp.LpSolutionOptimal else math.inf
