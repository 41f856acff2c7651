"""Weighted nearest neighbours on frozen features (Wu et al. 2018), the way RADIO reports ImageNet: k = 20, weights exp(cosine / 0.07)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from vision_agglom.evaluate.classes import require_classes


def knn_predict(
    train_NC: Tensor, classes_N: Tensor, queries_MC: Tensor, *, num_classes: int, k: int = 20, temperature: float = 0.07, chunk: int = 4096
) -> Tensor:
    """Return the class of each query by a vote of its k nearest training images.

    Args:
        train_NC: features of the training images.
        classes_N: their classes, int64.
        queries_MC: features to classify; compared in chunks, so that only [chunk, N] similarities exist at once.
        num_classes: classes there are.
        k: neighbours that vote; all of them where there are fewer.
        temperature: a neighbour's vote weighs exp(cosine / temperature).

    Returns:
        int64 [M].

    Raises:
        ValueError: there are no training images, not as many classes as images, or a class is out of range.
    """
    if len(train_NC) == 0 or len(train_NC) != len(classes_N):
        raise ValueError(f"kNN needs a class for each training image: {len(train_NC)} images, {len(classes_N)} classes")
    require_classes(classes_N, num_classes)
    train_NC = normalize(train_NC.float(), dim=1)
    votes_NK = one_hot(classes_N, num_classes).float()
    predictions = []
    for part_MC in queries_MC.split(chunk):
        similarity_MN = normalize(part_MC.float(), dim=1) @ train_NC.T
        nearest_MS, places_MS = similarity_MN.topk(min(k, len(train_NC)), dim=1)
        # Relative to the nearest, which changes no vote: exp(1 / 0.07) alone is 1.6e6.
        weights_MS = ((nearest_MS - nearest_MS[:, :1]) / temperature).exp()
        predictions.append((weights_MS[..., None] * votes_NK[places_MS]).sum(1).argmax(1))
    return torch.cat(predictions)


def accuracy(predictions_M: Tensor, classes_M: Tensor) -> float:
    """Return the share of right predictions."""
    return float((predictions_M == classes_M).double().mean())
