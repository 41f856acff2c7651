"""Sampling: which tokens stay, with which probabilities, and that a seed repeats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_hybrid.generate.sampling import Sampling, keep_top_k, keep_top_p, probabilities, sample

NUM_ROWS, VOCAB_SIZE = 50, 40


@pytest.fixture
def logits_BV() -> Tensor:
    return 3.0 * torch.randn(NUM_ROWS, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(temperature=1e-300)])
def test_the_most_probable_token_is_the_limit_of_every_setting(sampling: Sampling, logits_BV: Tensor) -> None:
    assert torch.equal(sample(logits_BV, sampling, seeded(0)), logits_BV.argmax(-1))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature: float, logits_BV: Tensor) -> None:
    torch.testing.assert_close(probabilities(logits_BV, Sampling(temperature)), (logits_BV.double() / temperature).softmax(-1))


@pytest.mark.parametrize("top_k", [1, 7, VOCAB_SIZE, VOCAB_SIZE + 1])
def test_top_k_keeps_the_k_largest(top_k: int, logits_BV: Tensor) -> None:
    kept = keep_top_k(logits_BV, top_k)
    expected = logits_BV >= logits_BV.sort(descending=True).values[:, [min(top_k, VOCAB_SIZE) - 1]]
    assert torch.equal(kept, logits_BV.where(expected, float("-inf")))


def test_top_k_keeps_no_more_among_equals() -> None:
    assert keep_top_k(torch.zeros(2, VOCAB_SIZE), 5).isfinite().sum(-1).tolist() == [5, 5]


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_have_that_much(top_p: float, logits_BV: Tensor) -> None:
    share_BV = logits_BV.double().softmax(-1)
    kept_BV = keep_top_p(logits_BV.double(), top_p).isfinite()
    for share_V, kept_V in zip(share_BV, kept_BV, strict=True):
        assert share_V[kept_V].sum() >= top_p
        assert share_V[kept_V].sum() - share_V[kept_V].min() < top_p
        assert kept_V.all() or share_V[kept_V].min() >= share_V[~kept_V].max()


def test_top_p_counts_what_top_k_left(logits_BV: Tensor) -> None:
    together = probabilities(logits_BV, Sampling(top_k=4, top_p=0.8))
    one_by_one = keep_top_p(keep_top_k(logits_BV.double(), 4), 0.8).softmax(-1)
    torch.testing.assert_close(together, one_by_one)
    assert (together.count_nonzero(-1) <= 4).all()


def test_tokens_come_as_often_as_they_are_probable() -> None:
    logits_BV = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])
    sampling = Sampling(temperature=0.8, top_k=4, top_p=0.95)
    num_draws = 40_000
    drawn = sample(logits_BV.expand(num_draws, -1), sampling, seeded(1))
    frequency = torch.bincount(drawn, minlength=5).double() / num_draws
    torch.testing.assert_close(frequency, probabilities(logits_BV, sampling)[0], atol=4 * 0.5 / num_draws**0.5, rtol=0)
    assert frequency[4] == 0


def test_a_seed_repeats_and_another_differs(logits_BV: Tensor) -> None:
    draws = [sample(logits_BV, Sampling(), seeded(seed)) for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 .* got -0.1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1, got 1.01"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
