"""From an encoded image to a square of pixels, with Pillow."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vision_agglom.images.framing import PAD_VALUE, Frame

_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I")

_ORIENTATION_TAG = 0x0112
_ORIENTATION_TURNED = frozenset({5, 6, 7, 8})
"""Values of the orientation tag that exchange width and height."""


class DamagedImage(ValueError):
    """An image that cannot be decoded."""


def decode_square(data: bytes, frame: Callable[[int, int], Frame], resolution: int) -> np.ndarray:
    """Decode an image and return the square that ``frame(width, height)`` chooses.

    JPEG is decoded at the smallest of its scales (1/2, 1/4, 1/8) that still has ``resolution`` pixels across the region. Orientation from
    EXIF is applied; alpha is dropped; 16-bit greys are scaled.

    Args:
        data: the encoded file.
        frame: from the upright size in pixels to the region to show.
        resolution: side of the square in pixels.

    Returns:
        uint8 [resolution, resolution, 3], RGB.

    Raises:
        DamagedImage: no format that Pillow reads, cut short, or too large to be meant (more than 179 million pixels).
    """
    image = _open(data)
    turned = _orientation(image) in _ORIENTATION_TURNED
    width, height = image.size[::-1] if turned else image.size
    framed = frame(width, height)
    upright = _load_rgb(image, framed, resolution)
    return _render(upright, framed, (width, height), resolution, Image.Resampling.BICUBIC)


def decode_mask(data: bytes, frame: Callable[[int, int], Frame], resolution: int, outside: int) -> np.ndarray:
    """Decode a mask of class indices as ``decode_square`` does an image, taking the nearest pixel; ``outside`` fills the padding.

    Returns:
        uint8 [resolution, resolution].

    Raises:
        DamagedImage: see there; or the mask has more than one channel.
    """
    image = _open(data)
    if image.mode not in ("L", "P"):
        raise DamagedImage(f"a mask must have one 8-bit channel, this has mode {image.mode}")
    try:
        indices = Image.fromarray(np.asarray(image))
    except _DECODE_ERRORS as error:
        raise _damaged(error) from None
    return _render(indices, frame(*image.size), image.size, resolution, Image.Resampling.NEAREST, outside)


def _damaged(error: Exception) -> DamagedImage:
    if isinstance(error, UnidentifiedImageError):
        return DamagedImage("no image, or of a format that Pillow does not read")  # Pillow's own text holds a memory address
    return DamagedImage(str(error) or type(error).__name__)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except _DECODE_ERRORS as error:
        raise _damaged(error) from None


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODE_ERRORS as error:
        raise _damaged(error) from None


def _load_rgb(image: Image.Image, frame: Frame, resolution: int) -> Image.Image:
    """Decode all of the image, upright, at the smallest scale that the frame allows."""
    left, top, right, bottom = frame.box
    scale = max(resolution * frame.width / (right - left), resolution * frame.height / (bottom - top))
    try:
        if scale < 1:
            image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        return _to_rgb(ImageOps.exif_transpose(image))
    except _DECODE_ERRORS as error:
        raise _damaged(error) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES:
        # Pillow's own conversion would clip at 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _render(
    image: Image.Image, frame: Frame, size: tuple[int, int], resolution: int, how: Image.Resampling, fill: int = PAD_VALUE
) -> np.ndarray:
    """Resample the frame's box, given in pixels of an image of ``size``, of which ``image`` may be a smaller copy."""
    across, down = image.width / size[0], image.height / size[1]
    left, top, right, bottom = frame.box
    box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
    filled = max(1, round(resolution * frame.width)), max(1, round(resolution * frame.height))
    part = np.asarray(image.resize(filled, how, box=box))
    if frame.mirrored:
        part = part[:, ::-1]
    if filled == (resolution, resolution):
        return np.ascontiguousarray(part)
    square = np.full((resolution, resolution, *part.shape[2:]), fill, dtype=np.uint8)
    square[: filled[1], : filled[0]] = part
    return square
