"""Which layers stand on which pipeline stage.

A virtual stage is a contiguous run of layers; there are pipeline x virtual_pipeline of them, and virtual stage v lives on pipeline rank
v % pipeline as its chunk v // pipeline. The cost of a stage is the training FLOPs per token of its layers, plus the output layer's on the
last. The embedding costs nothing here: a lookup does no arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from megatron_hybrid.layout.flops import head_training_flops, layer_training_flops
from megatron_hybrid.layout.pattern import parse_pattern
from megatron_hybrid.layout.shape import HybridShape, PipelineShape

Stages = tuple[tuple[int, int], ...]
"""(first, end) layer range per virtual stage, in model order."""


def plan_stages(model: HybridShape, parallel: PipelineShape, sequence_length: int) -> Stages:
    """Return the layers of every virtual stage, each layer exactly once and at least one per stage.

    ``parallel.stages`` decides where it is given; else the | marks of the pattern, unless one stage holds everything; else cost is
    balanced: of all plans whose most expensive virtual stage is as cheap as possible, the one with the least sum of squared stage costs,
    and of several such the one whose last stage begins earliest, then the one before it, and so on.

    Args:
        model: the layers, and the dimensions that give their cost.
        parallel: the number of stages, and perhaps their sizes.
        sequence_length: tokens per sample; the share of attention in the cost grows with it.

    Raises:
        ValueError: the stages given or marked do not match the layers or the layout, or there are more stages than layers.
    """
    num_stages = parallel.pipeline * parallel.virtual_pipeline
    num_layers = len(model.layer_kinds)
    asked = f"parallel.pipeline={parallel.pipeline} x parallel.virtual_pipeline={parallel.virtual_pipeline}"
    if parallel.stages is not None:
        sizes = _check_sizes(parallel.stages, num_layers, num_stages, asked)
    elif num_stages > num_layers:
        raise ValueError(f"{asked} asks for {num_stages} stages, but the model has only {num_layers} layers; every stage needs one")
    elif num_stages == 1:
        sizes = (num_layers,)
    elif "|" in model.pattern:
        sizes = tuple(len(segment) for segment in parse_pattern(model.pattern))
        if len(sizes) != num_stages:
            raise ValueError(
                f"the pattern's | marks make {len(sizes)} stages, but {asked} asks for {num_stages}; "
                "change the layout, the marks, or give parallel.stages"
            )
    else:
        sizes = _balance(stage_costs(model, _one_layer_each(num_layers), sequence_length), num_stages)
    stages = tuple(pairwise(accumulate(sizes, initial=0)))
    assert len(stages) == num_stages and stages[-1][1] == num_layers and all(first < end for first, end in stages)
    return stages


def stage_costs(model: HybridShape, stages: Stages, sequence_length: int) -> tuple[int, ...]:
    """Return the training FLOPs per token of each stage; the output layer stands on the last."""
    of_layers = [layer_training_flops(model.of_layer(layer), kind, sequence_length) for layer, kind in enumerate(model.layer_kinds)]
    costs = [sum(of_layers[first:end]) for first, end in stages]
    costs[-1] += head_training_flops(model)
    return tuple(costs)


def _check_sizes(sizes: tuple[int, ...], num_layers: int, num_stages: int, asked: str) -> tuple[int, ...]:
    if len(sizes) != num_stages:
        raise ValueError(f"parallel.stages={list(sizes)} names {len(sizes)} stages, but {asked} asks for {num_stages}")
    if min(sizes) < 1:
        raise ValueError(f"parallel.stages={list(sizes)} has a stage without layers; every stage needs at least one")
    if sum(sizes) != num_layers:
        raise ValueError(f"parallel.stages={list(sizes)} covers {sum(sizes)} layers, but the model has {num_layers}")
    return sizes


def _one_layer_each(num_layers: int) -> Stages:
    return tuple((layer, layer + 1) for layer in range(num_layers))


def _balance(costs: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Return how many consecutive items each stage takes, at least one, so that stage costs are as even as possible.

    Exact dynamic programming over (stages placed, items placed), under the least bound that any division can keep. Costs are whole numbers
    and positive, so there is no rounding in a comparison.
    """
    num_items = len(costs)
    before = list(accumulate(costs, initial=0))
    bound = _least_bound(costs, num_stages)
    unreachable = num_stages * before[-1] ** 2 + 1
    # least[end]: the least sum of squares that places the first `end` items on the stages so far; cuts[stage][end]: where the last begins.
    least = [0] + [unreachable] * num_items
    cuts = []
    for stage in range(num_stages):
        extended, cut = [unreachable] * (num_items + 1), [0] * (num_items + 1)
        for first in range(stage, num_items):
            for end in range(first + 1, num_items + 1):
                cost = before[end] - before[first]
                if cost > bound:
                    break
                if least[first] + cost**2 < extended[end]:
                    extended[end], cut[end] = least[first] + cost**2, first
        least = extended
        cuts.append(cut)
    assert least[num_items] < unreachable
    sizes = []
    end = num_items
    for cut in reversed(cuts):
        sizes.append(end - cut[end])
        end = cut[end]
    return tuple(reversed(sizes))


def _least_bound(costs: Sequence[int], num_stages: int) -> int:
    """Return the least possible cost of the most expensive stage, by bisection over the bound.

    A bound can be kept if filling stages one after another needs no more than ``num_stages``. Where it needs fewer, some stage can be
    split, and no stage grows by that.
    """
    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if _num_filled(costs, middle) <= num_stages:
            high = middle
        else:
            low = middle + 1
    return low


def _num_filled(costs: Sequence[int], bound: int) -> int:
    num_stages, filled = 1, 0
    for cost in costs:
        if filled + cost > bound:
            num_stages, filled = num_stages + 1, 0
        filled += cost
    return num_stages
