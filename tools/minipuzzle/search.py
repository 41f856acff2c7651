"""The grid: every combination of layer counts and widths that fits the target (arXiv 2504.03624, section 3). Arithmetic, without torch.

A point of the grid says how many layers of each kind there are and how wide they are; of each kind the highest-scoring layers are kept
(``Scores.layer_rank``), of each MLP layer the highest-scoring neurons. Points are put in an order by an estimate of the damage, which is
only good enough to decide what is worth running on tokens:

    damage = sum over dropped layers of mse  +  sum over kept layers of mse x (share of activation energy that is pruned away)

Dropping a layer whole changes the last hidden state by its mse, and dropping nothing by nothing; between them the energy of what is
pruned counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.layout.pattern import ATTENTION, KIND_NAMES, MAMBA, MLP
from tools.minipuzzle.candidate import Candidate
from tools.minipuzzle.config import SearchConfig
from tools.minipuzzle.latency import LatencyModel, LayerTimes
from tools.minipuzzle.memory import GIB, fixed_memory, layer_memory, shared_memory
from tools.minipuzzle.scores import Scores

_KINDS = (ATTENTION, MLP, MAMBA)


@dataclass(frozen=True)
class Estimate:
    """A candidate with what arithmetic says of it."""

    candidate: Candidate
    damage: float
    memory_gib: float
    latency_ms: float | None
    """None where nothing was measured."""


@dataclass(frozen=True)
class Widths:
    """Widths that all of a candidate's layers share."""

    hidden_size: int
    mamba_num_heads: int
    mamba_head_dim: int


@dataclass(frozen=True)
class LayerCosts:
    """What a candidate costs under one target, in bytes or milliseconds: a sum over its layers, and the most that one of them holds."""

    limit: float | None
    """Most of it."""
    least: float
    """Least of it that is worth looking at."""
    fixed: float
    layer: Callable[[str, int], float]
    """Of one more layer, by kind and, for an MLP layer, width."""
    shared: Callable[[str, int], float]
    """What layers of a kind and width hold one after another: of all layers of a candidate the largest counts."""

    def of_counts(self, counts: dict[str, np.ndarray], ffn_hidden_size: int) -> np.ndarray:
        """Return the cost of grids of layer counts at one width."""
        layers = sum(count * self.layer(kind, ffn_hidden_size) for kind, count in counts.items())
        shared = [np.where(count > 0, self.shared(kind, ffn_hidden_size), 0.0) for kind, count in counts.items()]
        return self.fixed + layers + np.max(shared, axis=0)

    def of_layers(self, layers: list[tuple[str, int]]) -> float:
        """Return the cost of layers, each (kind, width)."""
        return self.fixed + sum(self.layer(*each) for each in layers) + max((self.shared(*each) for each in layers), default=0.0)


def search_grid(parent: ModelConfig, scores: Scores, search: SearchConfig, latency: LatencyModel | None = None) -> list[Estimate]:
    """Return every point of the grid that fits the targets, the least damage first.

    Args:
        parent: the model to compress.
        scores: of its parts.
        search: grid and targets.
        latency: measured times; needed with a limit on latency.

    Raises:
        ValueError: the grid asks for what the parent does not have, widths were not scored, or no point fits (the message says what the
            smallest reachable is).
    """
    check_grid(parent, scores, search)
    found: list[Estimate] = []
    for widths in width_choices(parent, search):
        costs = layer_costs(parent, widths, search, latency)
        for ffn in ffn_choices(parent, search):
            found += _search_counts(parent, scores, search, widths, ffn, costs)
    if not found:
        raise ValueError(_nothing_fits(parent, search, latency))
    return sorted(found, key=lambda estimate: (estimate.damage, -estimate.memory_gib, estimate.candidate.layers))


def check_grid(parent: ModelConfig, scores: Scores, search: SearchConfig) -> None:
    """Refuse a grid that the parent or its scores cannot serve.

    Raises:
        ValueError: names the option, what it asks for and what there is.
    """
    for kind in _KINDS:
        name, there = KIND_NAMES[kind], parent.layer_kinds.count(kind)
        asked = getattr(search, name)
        if asked is not None and asked[1] > there:
            raise ValueError(f"search.{name}={list(asked)} asks for up to {asked[1]} layers, the parent has {there}; lower it")
    choices = {
        "ffn_hidden_sizes": (search.ffn_hidden_sizes, parent.ffn_hidden_size, bool(scores.neurons) or MLP not in parent.pattern, "ffn"),
        "mamba_num_heads": (search.mamba_num_heads, parent.mamba_num_heads, bool(scores.mamba), "mamba"),
        "mamba_head_dims": (search.mamba_head_dims, parent.mamba_head_dim, bool(scores.mamba), "mamba"),
        "hidden_sizes": (search.hidden_sizes, parent.hidden_size, scores.hidden is not None, "hidden"),
    }
    for name, (asked, there, is_scored, axis) in choices.items():
        if any(not 0 < value <= there for value in asked):
            raise ValueError(f"search.{name}={list(asked)} must lie between 1 and the parent's {there}")
        if any(value < there for value in asked) and not is_scored:
            raise ValueError(f"search.{name} asks for less than the parent's {there}, which was not scored; add {axis} to score.axes")
    uneven = [heads for heads in search.mamba_num_heads if heads % parent.mamba_num_groups]
    if uneven:
        raise ValueError(
            f"search.mamba_num_heads={uneven} are no multiples of mamba_num_groups={parent.mamba_num_groups}: "
            "every group keeps as many heads"
        )


def width_choices(parent: ModelConfig, search: SearchConfig) -> Iterator[Widths]:
    """Yield the widths shared by all layers that the grid asks for."""
    for values in product(
        search.hidden_sizes or (parent.hidden_size,),
        search.mamba_num_heads or (parent.mamba_num_heads,),
        search.mamba_head_dims or (parent.mamba_head_dim,),
    ):
        yield Widths(*values)


def ffn_choices(parent: ModelConfig, search: SearchConfig) -> tuple[int, ...]:
    """Return the MLP widths that the grid asks for."""
    return search.ffn_hidden_sizes or (parent.ffn_hidden_size,)


def count_range(parent: ModelConfig, search: SearchConfig, kind: str) -> tuple[int, int]:
    """Return the fewest and most layers of a kind that the grid asks for."""
    return getattr(search, KIND_NAMES[kind]) or (0, parent.layer_kinds.count(kind))


def layer_costs(parent: ModelConfig, widths: Widths, search: SearchConfig, latency: LatencyModel | None) -> dict[str, LayerCosts]:
    """Return the costs under each target, ``memory`` in bytes and, where times were measured, ``latency`` in milliseconds."""
    setting = search.memory
    shape = parent.model_copy(update=vars(widths))
    per_neuron = 2 * shape.hidden_size * setting.weight_bits / 8
    whole_mlp = layer_memory(shape, MLP, setting).total
    others = {kind: layer_memory(shape, kind, setting).total for kind in (ATTENTION, MAMBA)}
    limit = None if setting.limit_gib is None else setting.limit_gib * GIB

    def layer_bytes(kind: str, width: int) -> float:
        return whole_mlp - per_neuron * (shape.ffn_hidden_size - width) if kind == MLP else others[kind]

    costs = {
        "memory": LayerCosts(
            limit=limit,
            least=0.0 if setting.slack_gib is None else limit - setting.slack_gib * GIB,
            fixed=fixed_memory(shape, setting).total,
            layer=layer_bytes,
            shared=lambda kind, width: shared_memory(shape, kind, width, setting).total,
        )
    }
    if latency is not None:
        times: LayerTimes = latency.of(widths.hidden_size, widths.mamba_num_heads, widths.mamba_head_dim)
        costs["latency"] = LayerCosts(search.latency.limit_ms, 0.0, times.fixed, times.layer, lambda kind, width: 0.0)
    return costs


def kept_layers(scores: Scores, counts: dict[str, int]) -> tuple[int, ...]:
    """Return the best layers of each kind, as many as ``counts`` says, in model order."""
    kept: list[int] = []
    for kind, count in counts.items():
        kept += by_importance(scores, kind)[:count]
    return tuple(sorted(kept))


def by_importance(scores: Scores, kind: str) -> list[int]:
    """Return the layers of a kind, the most important first; of equals the earlier."""
    layers = [layer for layer, its in enumerate(scores.kinds) if its == kind]
    return sorted(layers, key=lambda layer: (-scores.layer_rank[layer], layer))


def pruned_energy(scores: Scores, layer: int, ffn_hidden_size: int, widths: Widths) -> float:
    """Return the share of a layer's activation energy (squared scores) that its pruned neurons, heads and channels had."""
    kept = 1.0
    if scores.kinds[layer] == MLP and layer in scores.neurons:
        kept *= _top_share(scores.neurons[layer] ** 2, ffn_hidden_size)
    if scores.kinds[layer] == MAMBA and layer in scores.mamba:
        energy_HP = scores.mamba[layer] ** 2
        kept *= _top_share(energy_HP.sum(0), widths.mamba_head_dim)
        groups = scores.model["mamba_num_groups"]
        by_group = energy_HP.sum(1).reshape(groups, -1)
        per_group = widths.mamba_num_heads // groups
        kept *= float(np.sort(by_group, axis=1)[:, by_group.shape[1] - per_group :].sum() / max(by_group.sum(), 1e-300))
    if scores.hidden is not None:
        kept *= _top_share(scores.hidden**2, widths.hidden_size)
    return 1.0 - kept


def damage_of(scores: Scores, candidate: Candidate) -> float:
    """Return the estimate for any candidate, of the grid or not."""
    widths = Widths(candidate.hidden_size, candidate.mamba_num_heads, candidate.mamba_head_dim)
    ffn = dict(zip((layer for layer in candidate.layers if scores.kinds[layer] == MLP), candidate.ffn_hidden_sizes, strict=True))
    kept = set(candidate.layers)
    return float(
        sum(
            mse * (pruned_energy(scores, layer, ffn.get(layer, 0), widths) if layer in kept else 1.0)
            for layer, mse in enumerate(scores.layer_mse)
        )
    )


def is_whole(parent: ModelConfig, widths: Widths) -> bool:
    """Whether these are the parent's own widths, at which all its layers, as wide as they are, make the parent and no candidate."""
    return vars(widths) == {name: getattr(parent, name) for name in vars(widths)}


def _grid_points(
    parent: ModelConfig, search: SearchConfig, widths: Widths, ffn: int, costs: dict[str, LayerCosts]
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """At one choice of widths: layers of each kind, whether that is a candidate (neither empty nor the parent), and what it costs."""
    ranges = [np.arange(first, last + 1) for first, last in (count_range(parent, search, kind) for kind in _KINDS)]
    counts = dict(zip(_KINDS, np.meshgrid(*ranges, indexing="ij"), strict=True))
    num_layers = sum(counts.values())
    # Without MLP layers their width says nothing: counted once.
    is_candidate = (num_layers > 0) & ((counts[MLP] > 0) | (ffn == ffn_choices(parent, search)[0]))
    if is_whole(parent, widths) and (ffn == parent.ffn_hidden_size or MLP not in parent.layer_kinds):
        is_candidate &= num_layers < parent.num_layers
    return counts, is_candidate, {name: cost.of_counts(counts, ffn) for name, cost in costs.items()}


def _search_counts(
    parent: ModelConfig, scores: Scores, search: SearchConfig, widths: Widths, ffn: int, costs: dict[str, LayerCosts]
) -> list[Estimate]:
    """All counts at one choice of widths that fit."""
    counts, fits, taken = _grid_points(parent, search, widths, ffn, costs)
    for name, cost in costs.items():
        if cost.limit is not None:
            fits &= (taken[name] <= cost.limit) & (taken[name] >= cost.least)
    damage = sum(_damage_by_count(scores, kind, ffn, widths)[counts[kind]] for kind in _KINDS)
    found = []
    for place in map(tuple, np.argwhere(fits)):
        number = {kind: int(counts[kind][place]) for kind in _KINDS}
        candidate = Candidate(
            kept_layers(scores, number), (ffn,) * number[MLP], widths.mamba_num_heads, widths.mamba_head_dim, widths.hidden_size
        )
        latency_ms = float(taken["latency"][place]) if "latency" in taken else None
        found.append(Estimate(candidate, float(damage[place]), float(taken["memory"][place] / GIB), latency_ms))
    return found


def _damage_by_count(scores: Scores, kind: str, ffn: int, widths: Widths) -> np.ndarray:
    """[layers of the kind + 1]: damage in layers of this kind when the best 0, 1, 2... of them are kept."""
    layers = by_importance(scores, kind)
    dropped = scores.layer_mse[layers]
    kept = dropped * np.array([pruned_energy(scores, layer, ffn, widths) for layer in layers])
    return dropped.sum() + np.concatenate([[0.0], np.cumsum(kept - dropped)])


def _top_share(energy: np.ndarray, count: int) -> float:
    if count >= energy.size:
        return 1.0
    return float(np.sort(energy)[energy.size - count :].sum() / max(energy.sum(), 1e-300))


def _nothing_fits(parent: ModelConfig, search: SearchConfig, latency: LatencyModel | None) -> str:
    """Why the grid is empty under the limits: the smallest and the fastest candidate in it, under each limit and under both."""
    reached: list[tuple[np.ndarray, np.ndarray]] = []
    for widths in width_choices(parent, search):
        costs = layer_costs(parent, widths, search, latency)
        for ffn in ffn_choices(parent, search):
            _, is_candidate, taken = _grid_points(parent, search, widths, ffn, costs)
            nothing = np.zeros_like(taken["memory"])
            reached.append((taken["memory"][is_candidate] / GIB, taken.get("latency", nothing)[is_candidate]))
    gib, ms = (np.concatenate(values) for values in zip(*reached, strict=True))
    if not gib.size:
        return "the grid is empty: it allows the parent alone, or no layer at all; allow fewer layers or smaller widths"
    memory, limit_ms = search.memory, search.latency.limit_ms
    fits_gib = gib <= (math.inf if memory.limit_gib is None else memory.limit_gib)
    fits_ms = ms <= (math.inf if limit_ms is None else limit_ms)
    memory_limit, latency_limit = f"search.memory.limit_gib={memory.limit_gib}", f"search.latency.limit_ms={limit_ms}"
    at_tokens = f"at {memory.context_tokens:,} tokens of context"
    causes = []
    if not fits_gib.any():
        causes.append(f"{memory_limit}: the smallest that the grid reaches takes {_round_up(gib.min())} GiB {at_tokens}")
    if not fits_ms.any():
        causes.append(f"{latency_limit}: the fastest that the grid reaches takes {_round_up(ms.min())} ms per step")
    if causes:
        return f"nothing fits {', nor '.join(causes)}; raise the limit, or allow fewer layers or smaller widths"
    if not (fits_gib & fits_ms).any():
        return (
            f"nothing fits {memory_limit} and {latency_limit} at once: the fastest within the memory takes {_round_up(ms[fits_gib].min())} "
            f"ms per step, the smallest within the time {_round_up(gib[fits_ms].min())} GiB {at_tokens}; raise one of the limits, or "
            "allow fewer layers or smaller widths"
        )
    return (
        f"nothing in the grid lies within search.memory.slack_gib={memory.slack_gib} of {memory_limit}: the largest that fits takes "
        f"{gib[fits_gib & fits_ms].max():.4g} GiB; widen the slack or the grid"
    )


def _round_up(value: float) -> str:
    """Four significant digits, never less than the value: given as the limit, they suffice.

    >>> _round_up(22.93512), _round_up(0.000123411), _round_up(0.5)
    ('22.94', '0.0001235', '0.5')
    """
    digit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / digit) * digit:.4g}"
