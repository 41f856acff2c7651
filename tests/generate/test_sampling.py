"""Sampling: which tokens stay, with which probabilities, and that a draw depends on seed and position alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_hybrid.generate.draws import uniforms
from megatron_hybrid.generate.sampling import NOT_FINITE, Needs, Sampling, SamplingRows, choose, penalise, probabilities

NUM_ROWS, VOCAB_SIZE = 50, 40


@pytest.fixture
def logits_BV() -> Tensor:
    return 3.0 * torch.randn(NUM_ROWS, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))


def rows_of(*settings: Sampling, num_rows: int = NUM_ROWS, prompt: tuple[int, ...] = (), vocab_size: int = VOCAB_SIZE) -> SamplingRows:
    """Row i has setting i (the settings in turn) and seed i."""
    rows = SamplingRows.greedy(num_rows, vocab_size, torch.device("cpu"))
    for row in range(num_rows):
        rows.set(row, settings[row % len(settings)], row, prompt)
    return rows


def distribution(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    return probabilities(logits_BV, rows_of(sampling), Needs.of([sampling]))


def chosen(logits_BV: Tensor, *settings: Sampling, position: int = 0) -> Tensor:
    positions_B = torch.full((len(logits_BV),), position)
    return choose(logits_BV, rows_of(*settings, num_rows=len(logits_BV)), positions_B, Needs.of(settings))


def shares_kept(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    return distribution(logits_BV, sampling) > 0


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.0), Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(min_p=1.0), Sampling(temperature=1e-300)]
)
def test_the_most_probable_token_is_the_limit_of_every_setting(sampling: Sampling, logits_BV: Tensor) -> None:
    assert torch.equal(chosen(logits_BV, sampling), logits_BV.argmax(-1))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature: float, logits_BV: Tensor) -> None:
    torch.testing.assert_close(distribution(logits_BV, Sampling(temperature)), (logits_BV.double() / temperature).softmax(-1))


@pytest.mark.parametrize("top_k", [1, 7, VOCAB_SIZE, VOCAB_SIZE + 1])
def test_top_k_keeps_the_k_largest(top_k: int, logits_BV: Tensor) -> None:
    expected = logits_BV >= logits_BV.sort(descending=True).values[:, [min(top_k, VOCAB_SIZE) - 1]]
    assert torch.equal(shares_kept(logits_BV, Sampling(top_k=top_k)), expected)


def test_top_k_keeps_no_more_among_equals() -> None:
    assert shares_kept(torch.zeros(NUM_ROWS, VOCAB_SIZE), Sampling(top_k=5)).sum(-1).tolist() == [5] * NUM_ROWS


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_have_that_much(top_p: float, logits_BV: Tensor) -> None:
    share_BV = logits_BV.double().softmax(-1)
    for share_V, kept_V in zip(share_BV, shares_kept(logits_BV, Sampling(top_p=top_p)), strict=True):
        assert share_V[kept_V].sum() >= top_p
        assert share_V[kept_V].sum() - share_V[kept_V].min() < top_p
        assert kept_V.all() or share_V[kept_V].min() >= share_V[~kept_V].max()


@pytest.mark.parametrize("min_p", [0.01, 0.3])
def test_min_p_keeps_what_is_probable_enough_beside_the_best(min_p: float, logits_BV: Tensor) -> None:
    share_BV = logits_BV.double().softmax(-1)
    assert torch.equal(shares_kept(logits_BV, Sampling(min_p=min_p)), share_BV >= min_p * share_BV.amax(-1, keepdim=True))


def test_top_p_counts_what_top_k_left(logits_BV: Tensor) -> None:
    together = distribution(logits_BV, Sampling(top_k=4, top_p=0.8))
    after_top_k_BV = logits_BV.masked_fill(~shares_kept(logits_BV, Sampling(top_k=4)), float("-inf"))
    torch.testing.assert_close(together, distribution(after_top_k_BV, Sampling(top_p=0.8)))
    assert (together.count_nonzero(-1) <= 4).all()


def test_a_penalty_is_for_what_prompt_and_text_have(logits_BV: Tensor) -> None:
    sampling = Sampling(temperature=0.0, repetition_penalty=2.0)
    rows = rows_of(sampling, prompt=(3, 7, VOCAB_SIZE + 5))
    penalised_BV = penalise(logits_BV, rows)
    for token in range(VOCAB_SIZE):
        before_B, after_B = logits_BV[:, token].double(), penalised_BV[:, token]
        expected_B = torch.where(before_B > 0, before_B / 2, before_B * 2) if token in (3, 7) else before_B
        assert torch.equal(after_B, expected_B)
    first_B = choose(logits_BV, rows, torch.zeros(NUM_ROWS, dtype=torch.int64), Needs.of([sampling]))
    again_BV = penalise(logits_BV, rows)
    assert torch.equal(again_BV.gather(1, first_B[:, None]) < logits_BV.gather(1, first_B[:, None]), torch.ones(NUM_ROWS, 1).bool())
    rows.set(0, sampling, 0, ())
    assert torch.equal(penalise(logits_BV, rows)[0], logits_BV[0].double()), "a new sequence begins with its own prompt"


def test_tokens_come_as_often_as_they_are_probable() -> None:
    sampling = Sampling(temperature=0.8, top_k=4, top_p=0.95)
    num_draws = 40_000
    logits_BV = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]]).expand(num_draws, -1)
    rows = SamplingRows.greedy(1, 5, torch.device("cpu"))
    rows.set(0, sampling, 7, ())
    rows = SamplingRows(**{name: tensor.expand(num_draws, *tensor.shape[1:]) for name, tensor in vars(rows).items()})
    drawn_B = choose(logits_BV, rows, torch.arange(num_draws), Needs.of([sampling]))
    frequency_V = torch.bincount(drawn_B, minlength=5).double() / num_draws
    expected_V = probabilities(logits_BV[:1], rows.rows(0, 1), Needs.of([sampling]))[0]
    torch.testing.assert_close(frequency_V, expected_V, atol=4 * 0.5 / num_draws**0.5, rtol=0)
    assert frequency_V[4] == 0


def test_uniforms_are_uniform_and_differ_by_seed_and_by_position() -> None:
    seeds, positions = torch.arange(300), torch.arange(400)
    grid = uniforms(seeds.repeat_interleave(400), positions.repeat(300)).view(300, 400)
    assert grid.min() >= 0 and grid.max() < 1 and grid.unique().numel() == grid.numel()
    counts = torch.histc(grid.float(), 100, 0, 1)
    assert ((counts - 1200).abs() < 6 * 1200**0.5).all()
    for one, other in ((grid[:, 1:], grid[:, :-1]), (grid[1:], grid[:-1])):
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / one.numel() ** 0.5
    largest = torch.tensor([2**63 - 1])
    assert 0 <= uniforms(largest, largest) < 1


def test_a_draw_does_not_depend_on_its_neighbours(logits_BV: Tensor) -> None:
    settings = [Sampling(), Sampling(top_p=0.7), Sampling(temperature=0.0), Sampling(top_k=3, min_p=0.1), Sampling(repetition_penalty=1.3)]
    together = chosen(logits_BV, *settings, position=9)
    for row in range(len(settings)):
        rows = SamplingRows.greedy(1, VOCAB_SIZE, torch.device("cpu"))
        rows.set(0, settings[row], row, ())
        alone = choose(logits_BV[row : row + 1], rows, torch.tensor([9]), Needs.of(settings[row : row + 1]))
        assert together[row] == alone


def test_a_seed_repeats_and_positions_differ(logits_BV: Tensor) -> None:
    draws = [chosen(logits_BV, Sampling(), position=position) for position in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.0), Sampling(top_p=0.5, repetition_penalty=1.2)])
def test_logits_that_are_not_finite_are_told(value: float, sampling: Sampling, logits_BV: Tensor) -> None:
    logits_BV[3, 11] = value
    tokens_B = chosen(logits_BV, sampling)
    assert (tokens_B == NOT_FINITE).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 .* got -0.1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1, got 1.01"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1, got -0.1"),
        ({"min_p": 1.1}, "min_p must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a finite number above 0, got 0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
