"""Which image a sample shows: global sample index -> (source, record), and what stands in for a damaged one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from megatron_hybrid.data.blend import Blend, BlendPhase
from megatron_hybrid.data.hashing import SeededShuffle, key64
from vision_agglom.config.images import ImagesConfig
from vision_agglom.images.open_source import open_source

MAX_STAND_INS = 16
"""Damaged images in a row that one sample gets over."""


class Mixture:
    """The sources of a run, blended by weight, each in a new order on each of its passes.

    Args:
        config: sources, weights and seed.

    Raises:
        ValueError: a source is missing, empty or damaged.
    """

    def __init__(self, config: ImagesConfig) -> None:
        self.names = tuple(config.sources)
        self.sources = tuple(open_source(source.path) for source in config.sources.values())
        self._weights = tuple(source.weight for source in config.sources.values())
        self._seed = config.seed
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "sources": self.sources, "_weights": self._weights, "_seed": self._seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def candidates(self, index: int) -> Iterator[tuple[int, int]]:
        """Yield (source, record) of sample ``index``, then those that stand in, in turn, while the ones before are damaged.

        All of them are functions of the seed and the index: which images are damaged changes no other sample.
        """
        _, source, place = self._blend.locate(index)
        length = len(self.sources[source])
        epoch, within = divmod(place, length)
        yield source, self._order(source, epoch)[within]
        for attempt in range(MAX_STAND_INS):
            yield source, key64("stand-in", self._seed, index, attempt) % length

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides which image each sample shows, as JSON data."""
        return {
            "seed": self._seed,
            "sources": {
                name: {"weight": weight, "num_images": len(source), "digest": source.digest()}
                for name, weight, source in zip(self.names, self._weights, self.sources, strict=True)
            },
        }

    def _prepare(self) -> None:
        self._blend = Blend([BlendPhase(0, self._weights)], self._seed)
        self._order = lru_cache(maxsize=4 * len(self.sources))(self._shuffle)

    def _shuffle(self, source: int, epoch: int) -> SeededShuffle:
        return SeededShuffle(len(self.sources[source]), "images", self._seed, self.names[source], epoch)
