"""Parameter counts are exact: the published ones to the unit, any other model's as the sum over its tensors."""

from __future__ import annotations

from math import prod

import pytest

from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.layout.parameters import (
    num_embedding_parameters,
    num_head_parameters,
    num_layer_parameters,
    num_parameters,
    num_parameters_by_kind,
    num_stage_parameters,
)
from tests.layout.shapes import preset, random_model, with_widths


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("nemotron-h-8b", 8_100_852_736),
        ("nemotron-3-nano-4b", 3_973_556_832),
        ("nemotron-h-56b", 56_324_350_464),
        ("nemotron-h-47b", 46_791_554_816),
        ("nemotron-h-4b", 4_489_223_040),
        ("hybrid-1b", 1_017_069_824),
        ("hybrid-cpu-12m", 11_640_760),
    ],
)
def test_presets_have_exactly_their_parameters(name: str, parameters: int) -> None:
    assert num_parameters(preset(name)) == parameters


def tensor_shapes(model: ModelConfig, kind: str, tensor: int) -> list[tuple[int, ...]]:
    """Every tensor of one layer on one tensor rank, written down from the layers' definitions."""
    hidden, inner = model.hidden_size, model.mamba_num_heads * model.mamba_head_dim // tensor
    heads, group_states = model.mamba_num_heads // tensor, model.mamba_num_groups * model.mamba_state_dim // tensor
    queries, keys = model.num_attention_heads * model.head_dim // tensor, model.num_kv_heads * model.head_dim // tensor
    in_proj = [(rows, hidden) for rows in (inner, inner, group_states, group_states, heads)]
    convolution = [shape for rows in (inner, group_states, group_states) for shape in ((rows, 1, model.mamba_conv_width), (rows,))]
    mixer = {
        "M": [*in_proj, *convolution, (heads,), (heads,), (heads,), (inner,), (hidden, inner)],
        "*": [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)],
        "-": [(model.ffn_hidden_size // tensor, hidden), (hidden, model.ffn_hidden_size // tensor)],
    }
    return [(hidden,), *mixer[kind]]


@pytest.mark.parametrize("tensor", [1, 2, 5])
@pytest.mark.parametrize("seed", range(10))
def test_layers_count_every_tensor_on_every_rank(seed: int, tensor: int) -> None:
    model = random_model(seed, tensor=tensor)
    for kind in "M*-":
        assert num_layer_parameters(model, kind, tensor) == sum(prod(shape) for shape in tensor_shapes(model, kind, tensor))


@pytest.mark.parametrize("seed", range(10))
def test_the_model_is_its_layers_two_padded_embeddings_and_a_norm(seed: int) -> None:
    model = random_model(seed)
    rows = -(-model.vocab_size // model.vocab_divisible_by) * model.vocab_divisible_by
    layers = sum(prod(shape) for kind in model.pattern for shape in tensor_shapes(model, kind, 1))
    assert num_parameters(model) == layers + 2 * rows * model.hidden_size + model.hidden_size


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_every_mlp_layer_counts_its_own_width(seed: int, tensor: int) -> None:
    uniform = random_model(seed, tensor=tensor)
    model = with_widths(uniform, seed, unit=tensor)
    widths = iter(model.ffn_hidden_sizes)
    of = [uniform.model_copy(update={"ffn_hidden_size": next(widths) if kind == "-" else 0}) for kind in model.layer_kinds]
    of_layers = [sum(map(prod, tensor_shapes(of[layer], kind, tensor))) for layer, kind in enumerate(model.layer_kinds)]
    stages = [(layer, layer + 1) for layer in range(model.num_layers)]
    counted = list(num_stage_parameters(model, stages, tensor))
    counted[0] -= num_embedding_parameters(model, tensor)
    counted[-1] -= num_head_parameters(model, tensor)
    assert counted == of_layers
    if tensor == 1:
        assert sum(num_parameters_by_kind(model).values()) == sum(of_layers)


def test_stages_add_up_to_the_model_and_the_ends_hold_embedding_and_head() -> None:
    model = random_model(1, num_layers=6)
    first, middle, last = num_stage_parameters(model, [(0, 1), (1, 5), (5, 6)])
    assert first + middle + last == num_parameters(model)
    assert first == num_layer_parameters(model, model.pattern[0]) + num_embedding_parameters(model)
    assert last == num_layer_parameters(model, model.pattern[5]) + num_head_parameters(model)


def test_tensor_ranks_share_everything_but_the_residual_norms() -> None:
    model = preset("nemotron-h-8b")
    (on_rank,) = num_stage_parameters(model, [(0, 52)], tensor=8)
    num_norms = 52 + 1
    assert 8 * on_rank - 7 * num_norms * model.hidden_size == num_parameters(model)
