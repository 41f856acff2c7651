"""One request, one batch of pixels: what a decoding worker does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vision_agglom.config.images import ImagesConfig
from vision_agglom.images.decode import DamagedImage, decode_square
from vision_agglom.images.framing import frame_sample
from vision_agglom.images.mixture import MAX_STAND_INS, Mixture


@dataclass(frozen=True)
class Request:
    """The samples of one micro-batch."""

    indices: range
    """Global sample indices."""
    resolution: int


class SampleReader(Dataset[tuple[Tensor, Tensor, int, list[str]]]):
    """Answers requests; a torch Dataset, so that a DataLoader can run it in worker processes."""

    def __init__(self, config: ImagesConfig) -> None:
        self.config = config
        self.mixture = Mixture(config)

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor, int, list[str]]:
        """Return (pixels uint8 [B, 3, resolution, resolution], sample indices int64 [B], resolution, "name: what is wrong" of each damaged
        image met).

        Raises:
            ValueError: more than ``MAX_STAND_INS`` damaged images in a row.
            OSError: a file is gone or cut short.
        """
        damaged: list[str] = []
        squares = [self._read(index, request.resolution, damaged) for index in request.indices]
        pixels_BCHW = torch.from_numpy(np.stack(squares).transpose(0, 3, 1, 2).copy())
        return pixels_BCHW, torch.tensor(list(request.indices), dtype=torch.int64), request.resolution, damaged

    def _read(self, index: int, resolution: int, damaged: list[str]) -> np.ndarray:
        for source, number in self.mixture.candidates(index):
            record = self.mixture.sources[source].read(number)
            try:
                return decode_square(record.image, lambda width, height: frame_sample(width, height, self.config, index), resolution)
            except DamagedImage as error:
                damaged.append(f"{record.name}: {error}")
        raise ValueError(
            f"source {self.mixture.names[source]!r}: {MAX_STAND_INS + 1} images drawn for sample {index} are all damaged, the last one "
            f"{damaged[-1]}; mend the collection or take it out"
        )
