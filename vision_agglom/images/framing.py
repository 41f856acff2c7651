"""Aspect handling: which part of an image becomes the square, as arithmetic on sizes.

Three ways, all resampled bicubic with antialiasing:

- ``random_resized_crop``: a part whose area share is even in ``crop_scale`` and whose aspect ratio is even in the logarithm of
  ``crop_ratio``, at an even place, stretched to the square (Szegedy et al. 2015, as torchvision and timm draw it);
- ``resize_crop``: the largest centred square;
- ``pad``: the whole image, longer side fitted, in the top left corner, so that patches begin at its corner; the rest is grey.

Sizes are fractions of the image's, so the region that a sample shows does not depend on the resolution it is shown at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vision_agglom.config.images import ImagesConfig
from vision_agglom.images.randomness import sample_uniforms

PAD_VALUE = 128
"""Grey of the padding, of 255."""

_ATTEMPTS = 10


@dataclass(frozen=True)
class Frame:
    """A region of an image and where it goes in the square."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels of the image."""
    width: float = 1.0
    """Share of the square's width that it fills, from the left."""
    height: float = 1.0
    """Share of the square's height that it fills, from the top."""
    mirrored: bool = False


def frame_sample(width: int, height: int, config: ImagesConfig, index: int) -> Frame:
    """Return what sample ``index`` shows of an image of ``width`` x ``height`` pixels."""
    uniforms = sample_uniforms(4 * _ATTEMPTS + 1, "crop", config.seed, index)
    mirrored = uniforms[-1] < config.flip_probability
    if config.aspect == "pad":
        return Frame(*_padded(width, height), mirrored=mirrored)
    if config.aspect == "resize_crop":
        return Frame(_centred(width, height), mirrored=mirrored)
    return Frame(_random_box(width, height, config, uniforms), mirrored=mirrored)


def frame_whole(width: int, height: int) -> Frame:
    """Return the largest centred square, as an evaluation sees an image."""
    return Frame(_centred(width, height))


def _centred(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _padded(width: int, height: int) -> tuple[tuple[float, float, float, float], float, float]:
    side = max(width, height)
    return (0.0, 0.0, float(width), float(height)), width / side, height / side


def _random_box(width: int, height: int, config: ImagesConfig, uniforms: list[float]) -> tuple[float, float, float, float]:
    low, high = config.crop_scale
    narrow, wide = (math.log(ratio) for ratio in config.crop_ratio)
    for attempt in range(_ATTEMPTS):
        share, ratio, across, down = uniforms[4 * attempt : 4 * attempt + 4]
        area = width * height * (low + (high - low) * share)
        aspect = math.exp(narrow + (wide - narrow) * ratio)
        box_width, box_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if box_width <= width and box_height <= height:
            left, top = across * (width - box_width), down * (height - box_height)
            return left, top, left + box_width, top + box_height
    # No draw fitted: the largest centred part of the nearest allowed shape.
    aspect = min(max(width / height, math.exp(narrow)), math.exp(wide))
    box_width, box_height = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height
