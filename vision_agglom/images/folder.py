"""A folder of image files, with subfolders.

Files are taken in the order of their relative paths. Where all images lie in subfolders, the first one's place in the sorted list is the
class, as in torchvision's ImageFolder. ``X.mask.png`` beside ``X.jpg`` is its mask.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from vision_agglom.images.records import IMAGE_EXTENSIONS, MASK_EXTENSION, Record, split_extension


class FolderSource:
    """The images below a folder.

    Raises:
        ValueError: the folder holds no image.
    """

    def __init__(self, folder: Path) -> None:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        self._folder = folder
        self._names = [name for name in names if split_extension(name)[1] in IMAGE_EXTENSIONS]
        self._masks = {split_extension(name)[0]: name for name in names if split_extension(name)[1] == MASK_EXTENSION}
        if not self._names:
            raise ValueError(f"{folder}: no image in it or below; expected files that end in {', '.join(sorted(IMAGE_EXTENSIONS))}")
        self._classes: dict[str, int] = {}
        if all("/" in name for name in self._names):
            self._classes = {name: number for number, name in enumerate(sorted({name.split("/")[0] for name in self._names}))}

    def __len__(self) -> int:
        return len(self._names)

    def read(self, number: int) -> Record:
        """Return image ``number``; raises OSError where it is gone."""
        name = self._names[number]
        mask = self._masks.get(split_extension(name)[0])
        return Record(
            name=str(self._folder / name),
            image=(self._folder / name).read_bytes(),
            class_index=self._classes[name.split("/")[0]] if self._classes else None,
            mask=None if mask is None else (self._folder / mask).read_bytes(),
        )

    def digest(self) -> str:
        """Return a hash of the images' relative paths and sizes."""
        digest = hashlib.blake2b(digest_size=8)
        for name in self._names:
            digest.update(f"{name}\0{(self._folder / name).stat().st_size}\0".encode())
        return digest.hexdigest()
