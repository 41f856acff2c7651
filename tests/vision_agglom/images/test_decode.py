"""Decoding: every kind of image becomes the same upright RGB square, and damage has one name."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from vision_agglom.images.decode import DamagedImage, decode_mask, decode_square
from vision_agglom.images.framing import Frame, frame_whole
from vision_agglom.images.pack import encode_jpeg, encode_png


def ramp(width: int, height: int) -> np.ndarray:
    """Red grows to the right, green downwards."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([across, down, np.full_like(across, 90)], axis=-1).round().astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """An image as a file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def everything(width: int, height: int) -> Frame:
    """The whole image, stretched."""
    return Frame((0, 0, width, height))


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = ramp(32, 32)
    np.testing.assert_array_equal(decode_square(encode_png(image), everything, 32), image)


def test_a_box_of_whole_pixels_is_cut_exactly() -> None:
    image = ramp(64, 64)
    square = decode_square(encode_png(image), lambda width, height: Frame((8, 16, 40, 48)), 32)
    np.testing.assert_array_equal(square, image[16:48, 8:40])
    mirrored = decode_square(encode_png(image), lambda width, height: Frame((8, 16, 40, 48), mirrored=True), 32)
    np.testing.assert_array_equal(mirrored, square[:, ::-1])


def test_padding_is_grey_and_right_and_below() -> None:
    square = decode_square(encode_png(ramp(40, 20)), lambda width, height: Frame((0, 0, 40, 20), 1.0, 0.5), 40)
    np.testing.assert_array_equal(square[:20], ramp(40, 20))
    assert (square[20:] == 128).all()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    grey = Image.fromarray(np.full((20, 30), 200, np.uint8))
    image = Image.fromarray(np.full((20, 30), 200 * 257, np.uint16)) if mode == "I;16" else grey.convert(mode)
    square = decode_square(encoded(image, "TIFF"), everything, 16)
    assert square.shape == (16, 16, 3) and square.dtype == np.uint8
    expected = 255 if mode == "1" else 200
    if mode != "1":  # dithered
        assert np.abs(square.astype(int) - expected).max() <= 2


def test_orientation_is_applied() -> None:
    upright = ramp(48, 32)
    turned = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    seen: list[tuple[int, int]] = []

    def frame(width: int, height: int) -> Frame:
        seen.append((width, height))
        return everything(width, height)

    square = decode_square(encoded(turned, "PNG", exif=exif), frame, 32)
    assert seen == [(48, 32)]
    assert np.abs(square.astype(int) - ramp(32, 32)).max() <= 4


def test_a_jpeg_decoded_small_shows_the_same() -> None:
    image = ramp(1024, 768)
    data = encode_jpeg(image)
    frame = Frame((100.5, 60.25, 900.5, 700.0))
    small = decode_square(data, lambda width, height: frame, 64).astype(int)
    full = decode_square(encode_png(image), lambda width, height: frame, 64).astype(int)
    assert np.abs(small - full).max() <= 4, "the box is scaled with the image"


def test_masks_keep_their_classes() -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[:, 30:] = 7
    square = decode_mask(encode_png(mask), frame_whole, 20, outside=255)
    assert set(np.unique(square)) == {0, 7}
    palette = Image.fromarray(mask).convert("P")
    palette.putpalette([0, 0, 0] * 256)
    np.testing.assert_array_equal(decode_mask(encoded(palette, "PNG"), frame_whole, 20, outside=255) > 0, square > 0)
    with pytest.raises(DamagedImage, match="one 8-bit channel, this has mode RGB"):
        decode_mask(encode_png(ramp(8, 8)), frame_whole, 8, outside=255)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_file_cut_short_is_damaged(kind: str) -> None:
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), kind)
    for share in (0.02, 0.5, 0.9):
        with pytest.raises(DamagedImage):
            decode_square(data[: int(len(data) * share)], everything, 16)


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", bytes(1000)])
def test_what_is_no_image_is_damaged(data: bytes) -> None:
    with pytest.raises(DamagedImage, match="no image, or of a format that Pillow does not read"):
        decode_square(data, everything, 16)


def test_our_own_errors_are_not_taken_for_damage() -> None:
    with pytest.raises(ZeroDivisionError):
        decode_square(encode_png(ramp(8, 8)), lambda width, height: Frame((0, 0, 1 / 0, 1)), 8)
    with pytest.raises(ValueError) as caught:
        decode_square(encode_png(ramp(8, 8)), lambda width, height: Frame((-4, 0, 8, 8)), 8)
    assert not isinstance(caught.value, DamagedImage)
