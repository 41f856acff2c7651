"""Matching figures, RankMe, scale equivariance and PCA colours, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from vision_agglom.evaluate.matching import MatchStatistics
from vision_agglom.evaluate.mode_switch import ScaleEquivariance, pool_grid
from vision_agglom.evaluate.pca import pca_colours
from vision_agglom.evaluate.rankme import RankMe


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_match_is_the_plain_formula_whatever_the_batches() -> None:
    teacher, student = random(7, 5, 4) * torch.tensor([1.0, 2, 3, 4]) + 50, random(7, 5, 4, seed=1)
    whole, parts = MatchStatistics(), MatchStatistics()
    whole.add(student, teacher)
    for start in range(0, 7, 3):
        parts.add(student[start : start + 3], teacher[start : start + 3])
    one, two = whole.result(), parts.result()
    assert one.mse == pytest.approx(float((student - teacher).double().square().mean()))
    variance = float(teacher.double().flatten(0, 1).var(0, correction=0).mean())
    assert one.teacher_variance == pytest.approx(variance)
    assert one.fidelity == pytest.approx(variance / one.mse)
    assert one.cosine_error == pytest.approx(float(1 - torch.cosine_similarity(student.double(), teacher.double(), dim=-1).mean()))
    assert one.num_rows == two.num_rows == 35
    for name in ("mse", "fidelity", "cosine_error", "teacher_variance", "student_variance"):
        assert getattr(two, name) == pytest.approx(getattr(one, name), rel=1e-12), name


def test_the_mean_has_fidelity_one_and_the_teacher_itself_infinity() -> None:
    teacher = random(50, 3)
    mean, itself = MatchStatistics(), MatchStatistics()
    mean.add(teacher.double().mean(0).expand(50, 3), teacher)
    itself.add(teacher, teacher)
    assert mean.result().fidelity == pytest.approx(1.0)
    assert itself.result().fidelity == math.inf and itself.result().cosine_error == pytest.approx(0, abs=1e-12)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and teacher features \(2, 4\)"):
        MatchStatistics().add(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="no features were compared"):
        MatchStatistics().result()


def test_rankme_counts_directions() -> None:
    def of(rows: torch.Tensor) -> float:
        rank = RankMe()
        for part in rows.split(7):
            rank.add(part)
        return rank.result()

    assert of(torch.eye(6).repeat(4, 1)) == pytest.approx(6, rel=1e-4)
    assert of(torch.ones(20, 6)) == pytest.approx(1, rel=1e-3)
    directions = torch.linalg.qr(random(8, 8))[0][:3]
    assert of(torch.cat([directions, -directions])) == pytest.approx(3, rel=1e-3)
    # Two directions, one three times as strong: singular values 3 : 1.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert of(torch.tensor([[3.0, 0.0], [0.0, 1.0]])) == pytest.approx(expected, rel=1e-4)


def test_rankme_is_the_definition_on_singular_values() -> None:
    rows = random(40, 12) @ random(12, 12, seed=1)
    shares = torch.linalg.svdvals(rows.double())
    shares = shares / shares.sum() + 1e-7
    rank = RankMe()
    rank.add(rows)
    assert rank.result() == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-8)
    with pytest.raises(ValueError, match="no features were counted"):
        RankMe().result()


def test_pooling_averages_by_area() -> None:
    grid = torch.arange(16.0).view(1, 16, 1)
    assert pool_grid(grid, (4, 4), (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    with pytest.raises(ValueError, match="cannot average a grid"):
        pool_grid(grid, (4, 4), (8, 8))


def test_features_that_only_get_finer_have_no_error() -> None:
    coarse = random(3, 16, 5)
    fine = coarse.unflatten(1, (4, 4)).repeat_interleave(3, 1).repeat_interleave(3, 2).flatten(1, 2)
    scale = ScaleEquivariance(64)
    scale.add({64: (coarse, (4, 4)), 192: (fine, (12, 12))})
    assert scale.error() == pytest.approx(0, abs=1e-12)


def test_a_constant_answer_at_the_other_side_has_error_one_and_a_shift_adds_its_square() -> None:
    base = random(3, 16, 5)
    mean = base.flatten(0, 1).mean(0)
    scale = ScaleEquivariance(64)
    scale.add({64: (base, (4, 4)), 32: (mean.expand(3, 4, 5), (2, 2))})
    pooled = pool_grid(base, (4, 4), (2, 2)).flatten(0, 1)
    assert scale.error() == pytest.approx(1.0, rel=1e-6)
    shift = ScaleEquivariance(64)
    shift.add({64: (base, (4, 4)), 32: (pool_grid(base, (4, 4), (2, 2)) + 2.0, (2, 2))})
    assert shift.error() == pytest.approx(4.0 / float(pooled.double().var(0, correction=0).mean()), rel=1e-5)


def test_scale_equivariance_over_batches_and_several_sides() -> None:
    whole, parts = ScaleEquivariance(64), ScaleEquivariance(64)
    batch = {64: (random(4, 16, 5), (4, 4)), 32: (random(4, 4, 5, seed=1), (2, 2)), 128: (random(4, 64, 5, seed=2), (8, 8))}
    whole.add(batch)
    for part in (slice(0, 1), slice(1, 4)):
        parts.add({side: (features[part], grid) for side, (features, grid) in batch.items()})
    assert parts.errors() == pytest.approx(whole.errors())
    assert list(whole.errors()) == [32, 128]
    with pytest.raises(ValueError, match="reference side 64 are missing"):
        whole.add({32: batch[32]})
    with pytest.raises(ValueError, match="at least two sides"):
        ScaleEquivariance(64).error()


def test_pca_colours_are_the_leading_axes() -> None:
    scores = random(2 * 12, 3) * torch.tensor([10.0, 3.0, 1.0])
    axes = torch.linalg.qr(random(8, 8, seed=1))[0][:3]
    features = (scores @ axes).view(2, 12, 8) + 5
    colours = pca_colours(features, (3, 4)).view(-1, 3)
    assert colours.min() == 0 and colours.max() == 1
    first = torch.corrcoef(torch.stack([colours[:, 0], scores[:, 0]]))[0, 1].abs()
    assert first > 0.95
    assert torch.equal(pca_colours(features, (3, 4)), pca_colours(features, (3, 4)))
