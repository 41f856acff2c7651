"""Which linears run in float8."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from megatron_hybrid.layout.float8 import LINEARS, plan_float8, unfit_linears
from tests.layout.shapes import preset

ALL = tuple(name for names in LINEARS.values() for name in names)


@dataclass(frozen=True)
class Choice:
    linears: tuple[str, ...] = ALL
    bf16_layers_at_start: int = 0
    bf16_layers_at_end: int = 0


def test_every_linear_of_the_8b_fits_at_eight_tensor_ranks() -> None:
    model = preset("nemotron-h-8b")
    assert unfit_linears(model, 8) == {}
    assert plan_float8(model, 8, Choice()) == tuple(LINEARS[kind] for kind in model.layer_kinds)


def test_in_proj_of_the_4b_fits_one_tensor_rank_only() -> None:
    """16,496 rows: 8,248, 4,124 and 2,062 at 2, 4 and 8 ranks are no multiples of 16."""
    model = preset("nemotron-h-4b")
    assert unfit_linears(model, 1) == {}
    assert [unfit_linears(model, tensor) for tensor in (2, 4, 8)] == [{"in_proj": (rows, 3072)} for rows in (8248, 4124, 2062)]
    plan = plan_float8(model, 2, Choice())
    assert [plan[index] for index in (0, 1, 7)] == [("out_proj",), ("linear_fc1", "linear_fc2"), ("linear_qkv", "linear_proj")]


def test_ends_are_counted_over_the_whole_pattern() -> None:
    model = preset("nemotron-h-8b")
    whole, plan = plan_float8(model, 1, Choice()), plan_float8(model, 1, Choice(bf16_layers_at_start=2, bf16_layers_at_end=3))
    assert plan == ((), ()) + whole[2:-3] + ((), (), ())


def test_only_the_linears_asked_for() -> None:
    plan = plan_float8(preset("nemotron-h-8b"), 1, Choice(("linear_fc1", "linear_qkv")))
    assert {name for names in plan for name in names} == {"linear_fc1", "linear_qkv"}


@pytest.mark.parametrize(
    ("tensor", "choice", "reason"),
    [
        (1, Choice(bf16_layers_at_start=30, bf16_layers_at_end=30), "52 layers, of which 30 at the start and 30 at the end stay in BF16"),
        (2, Choice(("in_proj",)), "not multiples of 16 at parallel.tensor=2: in_proj"),
    ],
)
def test_a_plan_without_float8_is_refused(tensor: int, choice: Choice, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plan_float8(preset("nemotron-h-4b"), tensor, choice)


def test_a_layer_whose_width_does_not_fit_stays_in_bf16_alone() -> None:
    model = preset("nemotron-h-8b")
    narrow = model.model_copy(update={"ffn_hidden_size": (21504,) * 5 + (21496,) + (21504,) * 18})
    whole, plan = plan_float8(model, 1, Choice()), plan_float8(narrow, 1, Choice())
    (odd,) = (layer for layer in range(52) if whole[layer] != plan[layer])
    assert narrow.of_layer(odd).ffn_hidden_size == 21496 and plan[odd] == ()
    assert unfit_linears(narrow, 1) == {"linear_fc1": (21496, 4096), "linear_fc2": (4096, 21496)}
