"""What a collection of images holds: encoded images with their names, classes and masks, read one by one by number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm"})
CLASS_EXTENSION = "cls"
MASK_EXTENSION = "mask.png"


@dataclass(frozen=True)
class Record:
    """One image as it lies in its collection."""

    name: str
    """Where it lies, for a person who wants to look at it."""
    image: bytes
    """The encoded file."""
    class_index: int | None = None
    mask: bytes | None = None
    """Encoded 8-bit image of class indices, as large as the image; 255 is no class."""


class ImageSource(Protocol):
    """A collection of images that can be read in any order, from any process."""

    def __len__(self) -> int: ...

    def read(self, number: int) -> Record:
        """Return record ``number``; raises OSError where the file is gone or cut short."""

    def digest(self) -> str:
        """Return what names the collection's contents and order, without where they lie."""


def split_extension(name: str) -> tuple[str, str]:
    """Return a member's key and extension: webdataset parts them at the first dot of the last path component.

    >>> split_extension("photos/00017.mask.png")
    ('photos/00017', 'mask.png')
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()
