"""Balancing makes terms of any scale pull alike, and learns what it says it learns."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_hybrid.substrate.groups import initialize, shutdown
from tests.vision_agglom.small import small_vision_run
from vision_agglom.balance import AdaLoss, uncertainty_weighted
from vision_agglom.config.schema import VisionConfig


def balance(run: VisionConfig) -> tuple[list[float], list[float]]:
    """Factors before anything was seen, and after steps in which one term is a thousand times the other."""
    substrate = initialize(run)
    adaloss = AdaLoss(("small", "large", "unseen"), 0.9, substrate.device)
    before = [float(adaloss.factor(term)) for term in adaloss.index]
    for _ in range(3):
        for rank_share in (1.0, 3.0):
            adaloss.observe("small", torch.full((2,), 0.01 * rank_share))
            adaloss.observe("large", torch.full((2,), 10.0 * rank_share))
        adaloss.finish_step(substrate.data_group)
    shutdown(substrate)
    return before, [float(adaloss.factor(term)) for term in adaloss.index]


def test_adaloss_divides_by_the_running_mean(tmp_path: Path, run_ranks) -> None:
    (before, after), *_ = run_ranks(balance, 1, small_vision_run(tmp_path))
    assert before == [1.0, 1.0, 1.0]
    torch.testing.assert_close(torch.tensor(after), torch.tensor([1 / 0.02, 1 / 20.0, 1.0]))


def test_the_best_log_variance_is_that_of_the_loss() -> None:
    """Its derivative, (1 - loss / s^2) / 2, vanishes at s^2 = loss."""
    for loss in (0.1, 1.0, 30.0):
        log_variance = torch.tensor(loss).log().requires_grad_()
        uncertainty_weighted(torch.tensor([loss]), log_variance).sum().backward()
        assert abs(float(log_variance.grad)) < 1e-6
