"""Which part of an image becomes the square."""

from __future__ import annotations

import numpy as np
import pytest

from vision_agglom.config.images import ImagesConfig
from vision_agglom.images.framing import frame_sample, frame_whole


def config(**options: object) -> ImagesConfig:
    """Options of one source that is never opened."""
    return ImagesConfig.model_validate({"sources": {"x": {"path": "nowhere"}}, **options})


SIZES = [(640, 480), (480, 640), (100, 100), (2000, 50), (3, 900), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
def test_random_crops_lie_inside_and_have_the_area_and_ratio_asked_for(size: tuple[int, int]) -> None:
    width, height = size
    options = config(crop_scale=(0.2, 0.6), crop_ratio=(0.5, 2.0))
    shares, ratios = [], []
    for index in range(300):
        left, top, right, bottom = frame_sample(width, height, options, index).box
        assert 0 <= left < right <= width * (1 + 1e-12) and 0 <= top < bottom <= height * (1 + 1e-12)
        shares.append((right - left) * (bottom - top) / (width * height))
        ratios.append((right - left) / (bottom - top))
    assert max(shares) <= 0.6 + 1e-9
    assert 0.5 - 1e-9 <= min(ratios) and max(ratios) <= 2.0 + 1e-9
    if max(size) < 2 * min(size):
        assert min(shares) >= 0.2 - 1e-9
        assert abs(np.mean(shares) - 0.4) < 0.04, "the share of the area is drawn evenly"
        assert abs(np.mean(np.log(ratios))) < 0.15, "the logarithm of the ratio is drawn evenly"


def test_a_frame_belongs_to_the_sample_and_the_seed() -> None:
    assert frame_sample(640, 480, config(), 7) == frame_sample(640, 480, config(), 7)
    assert frame_sample(640, 480, config(), 7) != frame_sample(640, 480, config(), 8)
    assert frame_sample(640, 480, config(), 7) != frame_sample(640, 480, config(seed=1), 7)


def test_the_region_is_a_fraction_of_the_image() -> None:
    small, large = (np.array(frame_sample(64 * k, 48 * k, config(), 3).box) for k in (1, 10))
    np.testing.assert_allclose(10 * small, large, rtol=1e-12)


def test_resize_crop_takes_the_centre() -> None:
    frame = frame_sample(640, 480, config(aspect="resize_crop", flip_probability=0), 5)
    assert frame.box == (80, 0, 560, 480) and (frame.width, frame.height, frame.mirrored) == (1, 1, False)
    assert frame == frame_whole(640, 480)


def test_pad_keeps_everything() -> None:
    frame = frame_sample(640, 480, config(aspect="pad"), 5)
    assert frame.box == (0, 0, 640, 480) and (frame.width, frame.height) == (1, 0.75)


def test_the_share_of_mirrored_samples() -> None:
    mirrored = [frame_sample(10, 10, config(flip_probability=0.25), index).mirrored for index in range(2000)]
    assert abs(np.mean(mirrored) - 0.25) < 0.04
    assert not any(frame_sample(10, 10, config(flip_probability=0), index).mirrored for index in range(50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_scale": (0.0, 1.0)}, "two shares of the area"),
        ({"crop_scale": (0.8, 0.4)}, "smallest <= largest"),
        ({"crop_ratio": (2.0, 1.0)}, "narrowest <= widest"),
        ({"aspect": "pad", "crop_scale": (0.3, 1.0)}, "crop_scale is not read with aspect=pad"),
        ({"sources": {}}, "at least 1 item"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)
