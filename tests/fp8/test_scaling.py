"""Scales follow amaxes; histories are a window of optimizer steps."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_hybrid.config.float8 import LARGEST_MARGIN
from megatron_hybrid.fp8.formats import E4M3, quantize
from megatron_hybrid.fp8.scaling import new_scale, rolled, window_amax

LARGEST_FP32 = torch.finfo(torch.float32).max


def scale_of(amax: float, *, previous: float = 3.0, largest: float = 448.0, margin: int = 0) -> float:
    return new_scale(torch.tensor(amax), torch.tensor(previous), largest, margin).item()


def test_amax_goes_to_the_end_of_the_format() -> None:
    assert scale_of(2.0) == 224.0
    assert scale_of(2.0, largest=57344.0) == 28672.0
    assert scale_of(2.0, margin=3) == 28.0


@pytest.mark.parametrize("amax", [0.0, math.inf, math.nan])
def test_an_amax_that_says_nothing_keeps_the_previous_scale(amax: float) -> None:
    assert scale_of(amax, previous=3.0) == 3.0


def test_an_infinite_scale_becomes_the_largest_number() -> None:
    assert scale_of(1e-40) == LARGEST_FP32


def test_a_scale_whose_inverse_would_overflow_keeps_the_previous_one() -> None:
    assert scale_of(1e38, margin=LARGEST_MARGIN) == 3.0, "448 / 1e38 / 2^18 is 1.7e-41, whose inverse is infinite"
    assert scale_of(1e38) == pytest.approx(4.48e-36)
    assert scale_of(1.0, margin=200) == 3.0, "2^-191 is zero in fp32"


def test_the_largest_margin_is_the_last_that_flushes_not_even_amax() -> None:
    """In E4M3, which inputs and weights have in either format."""
    for margin, is_flushed in ((LARGEST_MARGIN, False), (LARGEST_MARGIN + 1, True)):
        amax = torch.tensor(2.0)
        scale = new_scale(amax, torch.ones(()), E4M3.largest, margin)
        assert (quantize(amax, scale, E4M3).float() == 0) == is_flushed


def test_each_element_is_on_its_own() -> None:
    scales = new_scale(torch.tensor([[1.0, 0.0], [math.inf, 4.0]]), torch.full((2, 2), 5.0), torch.tensor([448.0, 57344.0]))
    assert scales.tolist() == [[448.0, 5.0], [5.0, 14336.0]]


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_window_is_the_last_steps(algorithm: str, length: int) -> None:
    amaxes = torch.rand(17, generator=torch.Generator().manual_seed(0)).tolist()
    history = torch.zeros(length)
    for step, amax in enumerate(amaxes):
        history[0] = amax
        window = torch.tensor(amaxes)[max(0, step + 1 - length) : step + 1]
        assert window_amax(history, algorithm) == (window.max() if algorithm == "max" else window[-1])
        history = rolled(history)
        assert history[0] == 0
