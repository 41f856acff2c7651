"""Images with their classes and masks, once and in order, as an evaluation wants them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vision_agglom.images.decode import decode_mask, decode_square
from vision_agglom.images.framing import frame_whole
from vision_agglom.images.records import ImageSource, Record

NO_CLASS = 255
"""Value of a mask's pixels that have no class."""


@dataclass(frozen=True)
class LabelledBatch:
    """Images with what is known of them."""

    images_BCHW: Tensor
    """float32 in [0, 1], RGB."""
    classes_B: Tensor | None
    """int64 class indices; None where the collection has none."""
    masks_BHW: Tensor | None
    """uint8 class of each pixel, 255 for none; None where the collection has no masks."""


def read_labelled(
    source: ImageSource, *, resolution: int, batch_size: int, first: int = 0, stop: int | None = None
) -> Iterator[LabelledBatch]:
    """Yield the images ``first`` to ``stop`` of a collection, each as its largest centred square.

    Raises:
        DamagedImage: an image cannot be decoded; an evaluation passes over none.
        ValueError: some images of a batch have classes or masks and others have not.
    """
    stop = len(source) if stop is None else min(stop, len(source))
    for start in range(first, stop, batch_size):
        records = [source.read(number) for number in range(start, min(start + batch_size, stop))]
        squares = np.stack([decode_square(record.image, frame_whole, resolution) for record in records])
        yield LabelledBatch(
            images_BCHW=torch.from_numpy(squares).permute(0, 3, 1, 2).float().div_(255.0),
            classes_B=_classes(records),
            masks_BHW=_masks(records, resolution),
        )


def check_labels(source: ImageSource, path: str, *, num_classes: int, resolution: int) -> None:
    """Look at every class and mask, and at no image, so that what probes cannot use is refused before any feature is computed.

    Args:
        path: what the collection is called in messages.
        num_classes: classes there are.
        resolution: side in pixels at which masks will be read.

    Raises:
        ValueError: an image has no class or no mask, or one beyond ``num_classes``; the message names it.
        DamagedImage: a mask cannot be decoded.
    """
    for number in range(len(source)):
        record = source.read(number)
        if record.class_index is None or record.mask is None:
            missing = "class (.cls)" if record.class_index is None else "mask (.mask.png)"
            raise ValueError(f"{record.name} of {path} has no {missing}; probes need classes and masks of every image")
        mask_HW = decode_mask(record.mask, frame_whole, resolution, NO_CLASS)
        for what, highest in (("class", record.class_index), ("mask", int(mask_HW.max(where=mask_HW != NO_CLASS, initial=0)))):
            if not 0 <= highest < num_classes:
                raise ValueError(
                    f"{record.name} of {path}: its {what} has class {highest}, but evaluation.num_classes={num_classes} has those from 0 "
                    f"to {num_classes - 1}; give evaluation.num_classes as many as there are"
                )


def _classes(records: list[Record]) -> Tensor | None:
    _require_alike(records, [record.class_index is not None for record in records], "class")
    return None if records[0].class_index is None else torch.tensor([record.class_index for record in records], dtype=torch.int64)


def _masks(records: list[Record], resolution: int) -> Tensor | None:
    _require_alike(records, [record.mask is not None for record in records], "mask")
    if records[0].mask is None:
        return None
    return torch.from_numpy(np.stack([decode_mask(record.mask, frame_whole, resolution, NO_CLASS) for record in records]))


def _require_alike(records: list[Record], present: list[bool], what: str) -> None:
    if any(present) and not all(present):
        raise ValueError(
            f"{records[present.index(False)].name} has no {what}, {records[present.index(True)].name} has one; label all or none"
        )
