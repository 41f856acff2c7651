"""Training FLOPs count what the model's definition asks for, and never more than the figures published for it."""

from __future__ import annotations

import pytest

from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.layout.flops import head_training_flops, layer_training_flops, training_flops_by_kind, training_flops_per_token
from tests.layout.shapes import PUBLISHED, preset, random_model, with_widths


def general_formula(model: ModelConfig, sequence_length: int) -> int:
    """The field's hybrid formula, given the true inner width: a scan of 7 per state element, no convolution, L / 2 positions per token."""
    hidden, inner, groups, state = model.hidden_size, model.mamba_inner_size, model.mamba_num_groups, model.mamba_state_dim
    mamba = 2 * hidden * (2 * inner + 2 * groups * state + model.mamba_num_heads) + 2 * inner * hidden + 7 * inner * state
    queries, keys = model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = 4 * hidden * (queries + keys) + 2 * queries * sequence_length
    mlp = 4 * hidden * model.ffn_hidden_size
    layers = {"M": mamba, "*": attention, "-": mlp}
    return 3 * (sum(layers[kind] for kind in model.layer_kinds) + 2 * hidden * model.vocab_size)


@pytest.mark.parametrize(
    ("name", "sequence_length", "published"),
    [
        ("nemotron-h-8b", 8192, 46.7e9),
        ("nemotron-h-56b", 8192, 340.2e9),
        ("nemotron-h-47b", 8192, 280.2e9),
        ("nemotron-h-4b", 8192, 25.78e9),
        ("nemotron-3-nano-4b", 4096, 22.31e9),
    ],
)
def test_totals_stay_just_under_the_published_figures(name: str, sequence_length: int, published: float) -> None:
    model = preset(name)
    assert general_formula(model, sequence_length) == pytest.approx(published, rel=5e-4)
    assert 0.994 < training_flops_per_token(model, sequence_length) / published < 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_difference_to_the_general_formula_is_scan_convolution_and_diagonal(name: str) -> None:
    model, sequence_length = preset(name), 4096
    channels = model.mamba_inner_size + 2 * model.mamba_num_groups * model.mamba_state_dim
    scan = model.layer_kinds.count("M") * 2 * model.mamba_inner_size * model.mamba_state_dim
    convolution = model.layer_kinds.count("M") * 2 * model.mamba_conv_width * channels
    diagonal = model.layer_kinds.count("*") * 2 * model.num_attention_heads * model.head_dim
    expected = general_formula(model, sequence_length) + 3 * (convolution + diagonal - scan)
    assert training_flops_per_token(model, sequence_length) == expected


def test_shares_of_nano_4b_by_kind() -> None:
    model = preset("nemotron-3-nano-4b")
    total = training_flops_per_token(model, 4096)
    shares = {kind: flops / total for kind, flops in training_flops_by_kind(model, 4096).items()}
    assert shares == pytest.approx({"M": 0.47, "*": 0.06, "-": 0.36}, abs=0.01)
    assert head_training_flops(model) / total == pytest.approx(0.11, abs=0.005)


@pytest.mark.parametrize("seed", range(5))
def test_attention_reads_each_position_up_to_its_own(seed: int) -> None:
    model, sequence_length = random_model(seed), 37
    width = model.num_attention_heads * model.head_dim
    projections = 2 * model.hidden_size * (2 * width + 2 * model.num_kv_heads * model.head_dim)
    of_the_sample = sum(projections + 2 * 2 * width * position for position in range(1, sequence_length + 1))
    assert layer_training_flops(model, "*", sequence_length) * sequence_length == 3 * of_the_sample


@pytest.mark.parametrize("seed", range(5))
def test_the_mixer_counts_its_recurrence_element_by_element(seed: int) -> None:
    model = random_model(seed)
    inner, group_states = model.mamba_inner_size, model.mamba_num_groups * model.mamba_state_dim
    weights = model.hidden_size * (3 * inner + 2 * group_states + model.mamba_num_heads)
    taps = (inner + 2 * group_states) * model.mamba_conv_width
    decay = outer_product = add_to_state = inner * model.mamba_state_dim
    contract_with_c = 2 * inner * model.mamba_state_dim
    forward = 2 * weights + 2 * taps + decay + outer_product + add_to_state + contract_with_c
    assert layer_training_flops(model, "M", 100) == 3 * forward


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_chunked_algorithm_takes_as_much_as_the_recurrence_we_count(name: str) -> None:
    """The docstring's claim: at the published chunk length the model's MFU would move by less than 0.2 % either way."""
    model, chunk = preset(name), 128
    inner, state = model.mamba_inner_size, model.mamba_state_dim
    # The formula's five terms, at a whole chunk: causal pairs of positions, counted one by one.
    pairs = sum(position for position in range(1, chunk + 1))
    scores, outputs = 2 * pairs * model.mamba_num_groups * state, 2 * pairs * inner
    per_chunk = scores + outputs + 2 * chunk * inner * state + 2 * chunk * inner * state + 2 * inner * state
    difference = 3 * model.layer_kinds.count("M") * (per_chunk / chunk - 5 * inner * state)
    assert abs(difference) < 0.002 * training_flops_per_token(model, 4096)


def test_padding_of_the_vocabulary_is_no_work() -> None:
    model = preset("nemotron-h-8b").model_copy(update={"vocab_size": 131_000})
    assert model.padded_vocab_size > model.vocab_size
    assert head_training_flops(model) == 6 * 4096 * 131_000


def test_only_attention_depends_on_the_sequence_length() -> None:
    model = preset("nemotron-h-8b")
    short, long = training_flops_by_kind(model, 1024), training_flops_by_kind(model, 8192)
    assert short["M"] == long["M"] and short["-"] == long["-"] and short["*"] < long["*"]


@pytest.mark.parametrize("seed", range(5))
def test_every_mlp_layer_costs_its_own_width(seed: int) -> None:
    model = with_widths(random_model(seed), seed)
    by_kind = training_flops_by_kind(model, 100)
    assert by_kind.get("-", 0) == 3 * 4 * model.hidden_size * sum(model.ffn_hidden_sizes)
    assert by_kind.get("M") == training_flops_by_kind(random_model(seed), 100).get("M")
