"""Each normalisation does what its row of PHI-S's table says, and can be undone, also inside a head's last linear."""

from __future__ import annotations

import pytest
import torch

from vision_agglom.targets.standardizers import Transformation, check_standardizer, make_transformation, principal_axes, split_bf16
from vision_agglom.targets.statistics import Moments

KINDS = ("none", "global", "standardize", "pca_w", "zca", "hca", "phi_s")
CHANNELS = 24


def features(count: int = 4000, rank: int = CHANNELS) -> torch.Tensor:
    """Channels that hang together, with scales over three orders of magnitude and a mean."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(rank, CHANNELS, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-1, 2, CHANNELS, dtype=torch.float64)
    return (torch.randn(count, rank, generator=generator, dtype=torch.float64) @ mixing) * scales + 5 * scales


def transform(kind: str, rows: torch.Tensor) -> Transformation:
    return make_transformation(kind, Moments.of(rows), eps=1e-9)


def normalised(kind: str) -> torch.Tensor:
    transformation = transform(kind, features())
    return (features() - transformation.mean_C) @ transformation.forward_CC.T


@pytest.mark.parametrize("kind", KINDS)
def test_normalisation_is_undone(kind: str) -> None:
    transformation = transform(kind, features())
    identity = transformation.forward_CC @ transformation.inverse_CC
    torch.testing.assert_close(identity, torch.eye(CHANNELS, dtype=torch.float64), rtol=0, atol=1e-8)
    rows = features(64).float()
    restored = transformation.denormalize(transformation.normalize(rows))
    assert ((restored - rows).norm() / rows.norm()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_head_speaks_the_teachers_space(kind: str) -> None:
    """Outputs of the last linear, folded, equal its own outputs denormalised, to 1e-5."""
    transformation = transform(kind, features())
    generator = torch.Generator().manual_seed(2)
    inner = torch.randn(100, 16, generator=generator)
    weight, bias = torch.randn(CHANNELS, 16, generator=generator), torch.randn(CHANNELS, generator=generator)
    folded_weight, folded_bias = transformation.fold(weight, bias)
    expected = (inner.double() @ weight.double().T + bias) @ transformation.inverse_CC.T + transformation.mean_C
    folded = inner @ folded_weight.float().T + folded_bias.float()
    assert ((folded - expected).abs().max() / expected.abs().max()) < 1e-5


def test_an_upsampling_head_is_folded_block_by_block() -> None:
    transformation = transform("phi_s", features())
    weight, bias = torch.randn(4 * CHANNELS, 16), torch.randn(4 * CHANNELS)
    folded_weight, folded_bias = transformation.fold(weight, bias)
    for block in range(4):
        part = slice(block * CHANNELS, (block + 1) * CHANNELS)
        alone = transformation.fold(weight[part], bias[part])
        assert torch.equal(folded_weight[part], alone[0]) and torch.allclose(folded_bias[part], alone[1], rtol=1e-13)


def test_phi_s_gives_every_channel_variance_one_by_one_scale() -> None:
    covariance = torch.cov(normalised("phi_s").T, correction=0)
    torch.testing.assert_close(covariance.diagonal(), torch.ones(CHANNELS, dtype=torch.float64), rtol=1e-9, atol=0)
    forward = transform("phi_s", features()).forward_CC
    gram = forward @ forward.T
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(CHANNELS, dtype=torch.float64), rtol=0, atol=1e-9 * float(gram[0, 0]))


@pytest.mark.parametrize("kind", ["pca_w", "zca", "hca"])
def test_whitening_whitens(kind: str) -> None:
    covariance = torch.cov(normalised(kind).T, correction=0)
    torch.testing.assert_close(covariance, torch.eye(CHANNELS, dtype=torch.float64), rtol=0, atol=1e-7)


def test_zca_is_symmetric() -> None:
    forward = transform("zca", features()).forward_CC
    torch.testing.assert_close(forward, forward.T, rtol=1e-9, atol=1e-12)


def test_global_and_per_channel_scales() -> None:
    whole = normalised("global")
    assert abs(float(whole.mean())) < 1e-9 and abs(float(whole.square().mean()) - 1) < 1e-9
    torch.testing.assert_close(normalised("standardize").std(0, correction=0), torch.ones(CHANNELS, dtype=torch.float64))


def test_axes_of_a_singular_covariance_do_not_hang_on_rounding() -> None:
    """The null space has no axes of its own; they are chosen, and a change in the fifteenth digit moves none of them."""
    covariance = Moments.of(features(rank=9)).covariance_CC
    values, vectors = principal_axes(covariance)
    noise = torch.randn(CHANNELS, CHANNELS, dtype=torch.float64)
    moved_values, moved = principal_axes(covariance * (1 + 1e-15 * (noise + noise.T)))
    assert int((values == 0).sum()) == CHANNELS - 9
    torch.testing.assert_close(moved, vectors, rtol=0, atol=1e-5)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(CHANNELS, dtype=torch.float64), rtol=0, atol=1e-9)


def test_constant_features_are_refused() -> None:
    with pytest.raises(ValueError, match="never vary over 10 positions"):
        transform("phi_s", torch.ones(10, CHANNELS))


def test_dimension_without_hadamard_matrix() -> None:
    with pytest.raises(ValueError, match="order 92"):
        check_standardizer("phi_s", 92)
    check_standardizer("zca", 92)


def test_three_bf16_parts_are_the_matrix() -> None:
    matrix = features(64).float()
    high, middle, low = split_bf16(matrix)
    assert torch.equal((low.float() + middle.float()) + high.float(), matrix)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="products of bf16 that sum in fp32 are CUDA's")
@pytest.mark.parametrize("kind", KINDS)
def test_targets_of_bf16_features_on_a_gpu(kind: str) -> None:
    """As precise as in fp32, although the products are of bf16."""
    transformation = transform(kind, features())
    on_gpu = Transformation(*(part.cuda() for part in (transformation.forward_CC, transformation.inverse_CC, transformation.mean_C)))
    rows = features(256).bfloat16().view(4, 64, CHANNELS)
    expected = (rows.double() - transformation.mean_C) @ transformation.forward_CC.T
    targets = on_gpu.normalize(rows.cuda()).cpu()
    assert targets.dtype == torch.float32
    in_fp32 = transformation.normalize(rows)
    allowed = 4 * (in_fp32 - expected).abs().max() + 1e-6 * expected.abs().max()
    assert (targets - expected).abs().max() <= allowed
