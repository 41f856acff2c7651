"""Every layer stands on exactly one stage, and the cuts are where the user, the pattern or the balance of cost says, in that order."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest

from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.schema import ParallelConfig
from megatron_hybrid.layout.stages import plan_stages, stage_costs
from tests.layout.shapes import PUBLISHED, preset, random_model

SEQUENCE_LENGTH = 64


def sizes(stages: tuple[tuple[int, int], ...]) -> list[int]:
    return [end - first for first, end in stages]


def with_pattern(pattern: str) -> ModelConfig:
    return preset("hybrid-cpu-12m").model_copy(update={"pattern": pattern})


# In models 36, 33, 12 and 23, at 3, 4, 5 and 5 stages, the cheapest bottleneck and the least sum of squares do not go together.
@pytest.mark.parametrize("seed", [*range(9), 36, 33, 12, 23])
@pytest.mark.parametrize(("pipeline", "virtual_pipeline"), [(2, 1), (3, 1), (4, 1), (2, 2), (5, 1), (9, 1)])
def test_no_other_plan_is_better(seed: int, pipeline: int, virtual_pipeline: int) -> None:
    model = random_model(seed, num_layers=9)
    num_stages = pipeline * virtual_pipeline

    def badness(stages: tuple[tuple[int, int], ...]) -> tuple[object, ...]:
        costs = stage_costs(model, stages, SEQUENCE_LENGTH)
        return max(costs), sum(cost**2 for cost in costs), stages[::-1]

    every_plan = [tuple(pairwise((0, *cuts, 9))) for cuts in combinations(range(1, 9), num_stages - 1)]
    planned = plan_stages(model, ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual_pipeline), SEQUENCE_LENGTH)
    assert planned == min(every_plan, key=badness)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 7, 16, 42])
def test_every_layer_is_covered_once(name: str, num_stages: int) -> None:
    model = preset(name)
    stages = plan_stages(model, ParallelConfig(pipeline=num_stages), 8192)
    assert len(stages) == num_stages
    assert [layer for first, end in stages for layer in range(first, end)] == list(range(model.num_layers))
    assert min(sizes(stages)) >= 1


def test_the_head_takes_layers_off_the_last_stage() -> None:
    assert sizes(plan_stages(preset("nemotron-3-nano-4b"), ParallelConfig(pipeline=4), 4096)) == [12, 12, 12, 6]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_balance_to_a_few_percent(name: str) -> None:
    model = preset(name)
    costs = stage_costs(model, plan_stages(model, ParallelConfig(pipeline=4), 8192), 8192)
    assert max(costs) * 4 / sum(costs) < 1.05


def test_of_equal_plans_the_later_stages_begin_earliest() -> None:
    model = with_pattern("-" * 14).model_copy(update={"vocab_size": 1})
    assert sizes(plan_stages(model, ParallelConfig(pipeline=4), SEQUENCE_LENGTH)) == [3, 4, 4, 3]


def test_explicit_stages_come_first() -> None:
    model = with_pattern("M-M*|-M-|M-")
    assert plan_stages(model, ParallelConfig(pipeline=3, stages=(1, 2, 6)), SEQUENCE_LENGTH) == ((0, 1), (1, 3), (3, 9))


def test_marks_in_the_pattern_come_before_balance() -> None:
    model = with_pattern("M|-M*-M-|M-")
    assert plan_stages(model, ParallelConfig(pipeline=3), SEQUENCE_LENGTH) == ((0, 1), (1, 7), (7, 9))


def test_marks_count_virtual_stages() -> None:
    model = with_pattern("M|-|M*|-")
    assert sizes(plan_stages(model, ParallelConfig(pipeline=2, virtual_pipeline=2), SEQUENCE_LENGTH)) == [1, 1, 2, 1]


def test_one_rank_holds_all_segments_of_a_marked_pattern() -> None:
    assert plan_stages(with_pattern("M-|M*-"), ParallelConfig(), SEQUENCE_LENGTH) == ((0, 5),)


@pytest.mark.parametrize(
    ("pattern", "parallel", "message"),
    [
        ("M-|M-|M-", {"pipeline": 2}, r"marks make 3 stages, but parallel.pipeline=2 x parallel.virtual_pipeline=1 asks for 2"),
        ("M-|M-", {"pipeline": 2, "virtual_pipeline": 2}, r"marks make 2 stages, but .* asks for 4"),
        ("M-M", {"pipeline": 4}, r"asks for 4 stages, but the model has only 3 layers"),
        ("M-M-", {"pipeline": 2, "stages": (1, 1, 2)}, r"stages=\[1, 1, 2\] names 3 stages, but .* asks for 2"),
        ("M-M-", {"pipeline": 2, "stages": (1, 2)}, r"stages=\[1, 2\] covers 3 layers, but the model has 4"),
        ("M-M-", {"pipeline": 2, "stages": (0, 4)}, r"stages=\[0, 4\] has a stage without layers"),
        ("M-M-", {"pipeline": 2, "stages": (-1, 5)}, r"stages=\[-1, 5\] has a stage without layers"),
        ("M-M-", {"stages": ()}, r"stages=\[\] names 0 stages, but .* asks for 1"),
    ],
)
def test_stages_that_do_not_fit_are_refused(pattern: str, parallel: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_stages(with_pattern(pattern), ParallelConfig.model_validate(parallel), SEQUENCE_LENGTH)


def test_wide_mlp_layers_take_others_off_their_stage() -> None:
    """Balance counts each layer's own width: as one number the two halves would be alike."""
    model = ModelConfig.model_validate(
        random_model(0).model_dump() | {"pattern": "------", "ffn_hidden_size": [10_000, 10_000, 100, 100, 100, 100], "vocab_size": 1}
    )
    stages = plan_stages(model, ParallelConfig(pipeline=2), 64)
    assert stages == ((0, 1), (1, 6))
    assert stage_costs(model, stages, 64)[0] == 12 * model.hidden_size * 10_000
