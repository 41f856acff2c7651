"""Segmentation with a linear layer on frozen patch features, judged by mean intersection over union."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

from vision_agglom.evaluate.classes import require_classes

IGNORED = 255
"""Pixels of a mask that count for nothing."""


@dataclass(frozen=True)
class PatchBatch:
    """Features of some images, and the class of every pixel."""

    spatial_BTC: Tensor
    grid: tuple[int, int]
    masks_BHW: Tensor
    """uint8, 255 where a pixel counts for nothing."""


def class_shares(masks_BHW: Tensor, num_classes: int, patch_size: int) -> Tensor:
    """Return the share of each class in every patch, fp32 [B, classes, rows, columns]."""
    # Class by class: all of them at the size of the images are gigabytes where classes are many.
    return torch.stack([avg_pool2d((masks_BHW == index).float(), patch_size) for index in range(num_classes)], 1)


def confusion(predicted: Tensor, actual: Tensor, num_classes: int) -> Tensor:
    """Count pixels: int64 [classes, classes], rows the actual class, columns the predicted one; ignored pixels are left out.

    Raises:
        ValueError: a class is out of range.
    """
    counted = actual != IGNORED
    for classes in (actual[counted], predicted[counted]):
        require_classes(classes, num_classes)
    pairs = actual[counted].long() * num_classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def iou_by_class(confusion_KK: Tensor) -> Tensor:
    """Return intersection over union of each class, float64 [classes]; nan for a class neither present nor predicted."""
    right_K = confusion_KK.diagonal().double()
    return right_K / (confusion_KK.sum(0) + confusion_KK.sum(1) - confusion_KK.diagonal())


def mean_iou(confusion_KK: Tensor) -> float:
    """Return the mean over the classes that occur in masks or predictions (MMSegmentation's mIoU)."""
    return float(iou_by_class(confusion_KK).nanmean())


class SegmentationProbe(nn.Module):
    """Standardised patch features to class logits, enlarged bilinearly to the mask."""

    def __init__(self, mean_C: Tensor, std_C: Tensor, num_classes: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("mean_C", mean_C.float())
        self.register_buffer("std_C", std_C.float().clamp_min(1e-6))
        generator = torch.Generator().manual_seed(seed)
        self.classify = nn.Linear(len(mean_C), num_classes).to(mean_C.device)
        with torch.no_grad():
            self.classify.weight.copy_(torch.randn(self.classify.weight.shape, generator=generator) * 0.01)
            self.classify.bias.zero_()

    def forward(self, batch: PatchBatch) -> Tensor:
        """Return logits [B, classes, H, W] at the masks' size."""
        logits_BTK = self.classify((batch.spatial_BTC.float() - self.mean_C) / self.std_C)
        logits_BKhw = logits_BTK.mT.unflatten(2, batch.grid)
        return interpolate(logits_BKhw, size=tuple(batch.masks_BHW.shape[1:]), mode="bilinear", align_corners=False)


def fit_segmentation_probe(
    batches: Callable[[], Iterable[PatchBatch]], *, num_classes: int, epochs: int = 10, learning_rate: float = 1e-2, seed: int = 0
) -> SegmentationProbe:
    """Train with AdamW and a cosine schedule, streaming the batches once to standardise and once per epoch.

    Args:
        batches: gives the training batches from the beginning each time it is called.

    Raises:
        ValueError: it gives none, or a mask has a class out of range.
    """
    count, total, squares, num_batches = 0, torch.zeros(()), torch.zeros(()), 0
    for batch in batches():
        require_classes(batch.masks_BHW[batch.masks_BHW != IGNORED], num_classes)
        rows_NC = batch.spatial_BTC.flatten(0, 1).double()
        count, num_batches = count + len(rows_NC), num_batches + 1
        total, squares = total.to(rows_NC.device) + rows_NC.sum(0), squares.to(rows_NC.device) + rows_NC.square().sum(0)
    if not count:
        raise ValueError("a segmentation probe needs images with masks to train on; there are none")
    mean_C = total / count
    probe = SegmentationProbe(mean_C, (squares / count - mean_C.square()).clamp_min(0).sqrt(), num_classes, seed)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * num_batches)
    with torch.enable_grad():
        for _ in range(epochs):
            for batch in batches():
                loss = cross_entropy(probe(batch), batch.masks_BHW.long(), ignore_index=IGNORED)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return probe.eval()


@torch.no_grad()
def evaluate_segmentation(probe: SegmentationProbe, batches: Iterable[PatchBatch] | Iterator[PatchBatch], num_classes: int) -> Tensor:
    """Return the confusion matrix over all batches."""
    total_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for batch in batches:
        total_KK += confusion(probe(batch).argmax(1), batch.masks_BHW, num_classes).cpu()
    return total_KK
