"""Mosaics: laid out by whole patches, and cut back exactly."""

from __future__ import annotations

import pytest
import torch

from vision_agglom.contract import TeacherFacts, TeacherFeatures
from vision_agglom.images.mosaic import MosaicTeacher, compose_mosaic, cut_mosaic, plan_mosaic

SAM = TeacherFacts(name="sam", patch_size=16, resolution=1024, fixed_resolution=True, summary_channels=None, spatial_channels=3)


class MeanColour:
    """A teacher that looks at one patch at a time: the colour of each."""

    def __init__(self, patch_size: int, resolution: int) -> None:
        self.facts = TeacherFacts("colour", patch_size, resolution, True, None, 3)
        self.num_passes = 0

    def __call__(self, images_BCHW: torch.Tensor) -> TeacherFeatures:
        assert images_BCHW.shape[2:] == (self.facts.resolution, self.facts.resolution)
        self.num_passes += len(images_BCHW)
        return describe(images_BCHW, self.facts.patch_size)


def describe(images_BCHW: torch.Tensor, patch_size: int) -> TeacherFeatures:
    """Mean colour of each patch."""
    patches = torch.nn.functional.avg_pool2d(images_BCHW, patch_size)
    return TeacherFeatures(None, patches.flatten(2).mT, tuple(patches.shape[2:]))


def test_the_papers_two_mosaics() -> None:
    low, high = plan_mosaic(256, SAM), plan_mosaic(432, SAM)
    assert (low.per_side, low.cell_tokens, low.image_tokens, low.used_share) == (4, 16, 16, 1.0)
    assert (high.per_side, high.cell_tokens, high.image_tokens) == (2, 32, 27)
    assert high.used_share == 4 * 27**2 / 64**2


@pytest.mark.parametrize("image_side", [16, 48, 64, 80, 112])
@pytest.mark.parametrize("num_images", [1, 3, 4, 13])
def test_features_cut_back_are_those_of_the_single_images(image_side: int, num_images: int) -> None:
    torch.manual_seed(0)
    teacher = MeanColour(16, 224)
    images = torch.rand(num_images, 3, image_side, image_side)
    mosaic = MosaicTeacher(teacher, image_side, torch.tensor([0.1, 0.2, 0.3]))
    features, expected = mosaic(images), describe(images, 16)
    assert features.grid == expected.grid and features.summary_BC is None
    assert torch.equal(features.spatial_BTC, expected.spatial_BTC)
    assert teacher.num_passes == -(-num_images // mosaic.plan.images_per_canvas)


def test_padding_has_the_colour_asked_for() -> None:
    plan = plan_mosaic(80, TeacherFacts("x", 16, 224, True, None, 3))
    canvas = compose_mosaic(torch.ones(3, 3, 80, 80), plan, torch.tensor([0.1, 0.2, 0.3]))
    assert canvas.shape == (1, 3, 224, 224)
    padding = canvas[0][:, ~(canvas[0] == 1).all(0)]
    assert padding.shape[1] == 224**2 - 3 * 80**2
    assert torch.equal(padding.unique(dim=1).flatten(), torch.tensor([0.1, 0.2, 0.3]))


def test_a_canvas_whose_side_k_does_not_divide_is_padded_right_and_below() -> None:
    plan = plan_mosaic(32, TeacherFacts("x", 16, 176, True, None, 3), per_side=3)
    assert (plan.canvas_tokens, plan.cell_tokens) == (11, 3)
    positions = torch.arange(11 * 11.0).view(1, 121, 1)
    cut = cut_mosaic(positions, plan, 9).view(3, 3, 4)
    assert cut[0, 1].tolist() == [3, 4, 14, 15]
    assert cut[2, 2].tolist() == [72, 73, 83, 84]


def test_gradients_of_nothing_are_needed() -> None:
    mosaic = MosaicTeacher(MeanColour(16, 64), 32, torch.zeros(3))
    assert not mosaic(torch.rand(4, 3, 32, 32)).spatial_BTC.requires_grad


@pytest.mark.parametrize(
    ("side", "per_side", "message"),
    [
        (250, None, "250 pixels is no multiple of 16; choose 240 or 256"),
        (1040, None, "images of 1040 pixels does not fit teacher 'sam', whose square has 1024 pixels; use smaller images"),
        (432, 3, "a mosaic of 3 x 3 images of 432 pixels does not fit .*; at most 2 x 2 do"),
    ],
)
def test_a_mosaic_that_does_not_fit_is_refused(side: int, per_side: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_mosaic(side, SAM, per_side)


def test_images_of_another_side_are_refused() -> None:
    with pytest.raises(ValueError, match=r"laid out for images of 32 pixels a side, got \(48, 48\)"):
        MosaicTeacher(MeanColour(16, 64), 32, torch.zeros(3))(torch.rand(1, 3, 48, 48))
