"""From the path in a configuration to a collection that can be read."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from vision_agglom.images.folder import FolderSource
from vision_agglom.images.records import ImageSource
from vision_agglom.images.shards import ShardSource

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_source(path: str) -> ImageSource:
    """Open a folder of images, or the webdataset shards that ``path`` names (a .tar, a folder of them, or a pattern).

    Raises:
        ValueError: nothing is there, a shard of a numbered range is missing, or the collection is empty or damaged.
    """
    folder = Path(path)
    if folder.is_dir():
        shards = sorted(folder.glob("*.tar"))
        return ShardSource(shards) if shards else FolderSource(folder)
    shards = [Path(name) for part in expand_braces(path) for name in _match(part, path)]
    not_tar = [str(shard) for shard in shards if shard.suffix != ".tar"]
    if not_tar:
        raise ValueError(f"{path}: {not_tar[0]} is neither a folder nor a .tar; expected a folder of images or webdataset shards")
    return ShardSource(shards)


def expand_braces(pattern: str) -> list[str]:
    """Return the names that ``{first..last}`` in a pattern stands for, numbers padded to the first's width.

    >>> expand_braces("a{08..10}.tar")
    ['a08.tar', 'a09.tar', 'a10.tar']
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    names = [f"{pattern[: found.start()]}{number:0{len(first)}d}{pattern[found.end() :]}" for number in range(int(first), int(last) + 1)]
    return [expanded for name in names for expanded in expand_braces(name)]


def _match(part: str, path: str) -> list[str]:
    names = sorted(glob.glob(part)) if glob.has_magic(part) else [part] if Path(part).exists() else []
    if not names:
        raise ValueError(f"{part}: no such file or folder (given as {path})" if part != path else f"{path}: no such file or folder")
    return names
