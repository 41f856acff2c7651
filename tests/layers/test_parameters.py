"""How parameters start, and what their declarations promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_hybrid.layers.parameters import Component, declare, inverse_softplus_time_step, log_uniform_decay, normal, ones, uniform

NUM_DRAWS = 20_000


def test_time_steps_start_log_uniform_between_a_thousandth_and_a_tenth() -> None:
    dt_bias = inverse_softplus_time_step(np.random.default_rng(0), (NUM_DRAWS,))
    log_step = F.softplus(torch.from_numpy(dt_bias)).log10()
    assert -3 - 1e-9 <= log_step.min() < -2.99 and -1.01 < log_step.max() <= -1 + 1e-9
    quarters = log_step.histc(4, -3, -1) / NUM_DRAWS
    assert (quarters - 0.25).abs().max() < 0.015, quarters


def test_decay_rates_start_uniform_between_1_and_16() -> None:
    rates = np.exp(log_uniform_decay(np.random.default_rng(0), (NUM_DRAWS,)))
    assert 1 <= rates.min() < 1.01 and 15.99 < rates.max() <= 16
    assert abs(rates.mean() - 8.5) < 0.1


def test_weights_start_with_the_spread_asked_for() -> None:
    generator = np.random.default_rng(0)
    drawn = normal(0.02)(generator, (NUM_DRAWS,))
    assert abs(drawn.mean()) < 5e-4 and abs(drawn.std() - 0.02) < 4e-4
    drawn = uniform(-0.5, 0.25)(generator, (NUM_DRAWS,))
    assert -0.5 <= drawn.min() < -0.499 and 0.249 < drawn.max() < 0.25
    assert (ones(generator, (3, 2)) == 1).all()


def test_a_declaration_speaks_of_the_whole_parameter() -> None:
    parameter = torch.nn.Parameter(torch.empty(6, 4))
    declare(parameter, initializer=ones, tensor_ranks=2, axis=0, components=(Component("x", 8), Component("B", 4)))
    assert parameter.declaration.global_shape == (12, 4)
    assert (parameter.tensor_model_parallel, parameter.partition_dim) == (True, 0)
    declare(parameter, initializer=ones, tensor_ranks=2)
    assert parameter.declaration.global_shape == (6, 4), "every rank holds it whole"
    assert parameter.tensor_model_parallel is False


def test_components_that_do_not_add_up_are_our_own_error() -> None:
    with pytest.raises(AssertionError):
        declare(torch.nn.Parameter(torch.empty(6, 4)), initializer=ones, tensor_ranks=2, axis=0, components=(Component("x", 8),))
