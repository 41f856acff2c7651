"""Every term of the loss against its formula, and at the places where formulas break."""

from __future__ import annotations

import math

import pytest
import torch

from vision_agglom import losses
from vision_agglom.balance import uncertainty_weighted


def test_cosine() -> None:
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    second = torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    torch.testing.assert_close(losses.summary_cosine(first, second), torch.tensor([0.0, 1.0, 2.0]))


def test_angle_over_dispersion() -> None:
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    second = torch.tensor([[0.0, 2.0], [1.0, 1.0], [-1.0, 0.0]])
    expected = torch.tensor([math.pi / 2, math.pi / 4, math.pi]).square() / 0.5
    torch.testing.assert_close(losses.summary_angle(first, second, torch.tensor(0.5)), expected)


@pytest.mark.parametrize("second", [[1.0, 0.0], [-1.0, 0.0], [1.0, 1e-7]])
def test_angle_has_a_gradient_everywhere(second: list[float]) -> None:
    """acos has none at 0 and pi."""
    first = torch.tensor([[1.0, 0.0]], requires_grad=True)
    losses.summary_angle(first, torch.tensor([second]), torch.tensor(1.0)).sum().backward()
    assert torch.isfinite(first.grad).all()


def test_spatial_terms_count_masked_positions_alone() -> None:
    student, target = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    mask = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    expected = (student[0, [0, 2]] - target[0, [0, 2]]).square().mean()
    torch.testing.assert_close(losses.spatial_mse(student, target, mask), torch.stack([expected, torch.tensor(0.0)]))
    changed = student.clone()
    changed[:, [1, 3, 4]] = 100
    for loss in (losses.spatial_mse, lambda s, t, m: losses.spatial_cosine_smooth_l1(s, t, 1.0, m), losses.mesa):
        torch.testing.assert_close(loss(changed, target, mask), loss(student, target, mask))


def test_cosine_smooth_l1_mix() -> None:
    student, target = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    # cos 0; smooth L1 with beta 1: 1.5 and 0.5.
    torch.testing.assert_close(losses.spatial_cosine_smooth_l1(student, target, 1.0), torch.tensor([0.9 * 1 + 0.1 * 1.0]))


def test_mesa_ignores_scale_and_offset() -> None:
    student = torch.randn(2, 5, 16)
    torch.testing.assert_close(losses.mesa(3 * student + 1, student), torch.zeros(2), rtol=0, atol=1e-4)


def test_uncertainty_is_least_where_the_variance_is_the_loss() -> None:
    loss = torch.tensor([0.3])
    log_variance = torch.tensor(math.log(0.3), requires_grad=True)
    uncertainty_weighted(loss, log_variance).sum().backward()
    assert abs(float(log_variance.grad)) < 1e-6
