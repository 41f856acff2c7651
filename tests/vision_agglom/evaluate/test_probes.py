"""Probes on frozen features, against closed forms and other libraries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode

from vision_agglom.evaluate.knn import accuracy, knn_predict
from vision_agglom.evaluate.linear_probe import fit_linear_probe
from vision_agglom.evaluate.segmentation import (
    PatchBatch,
    class_shares,
    confusion,
    evaluate_segmentation,
    fit_segmentation_probe,
    iou_by_class,
    mean_iou,
)
from vision_agglom.evaluate.zero_shot import embed_classes, zero_shot_predict


def blobs(count: int, spread: float, seed: int = 0, num_classes: int = 4, channels: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around one centre per class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, channels, generator=torch.Generator().manual_seed(99))
    classes = torch.randint(num_classes, (count,), generator=generator)
    return centres[classes] + spread * torch.randn(count, channels, generator=generator), classes


def test_knn_is_scikit_learns_with_the_same_weights() -> None:
    train, classes = blobs(200, 0.8)
    queries, _ = blobs(100, 0.8, seed=1)
    unit = torch.nn.functional.normalize
    theirs = KNeighborsClassifier(20, algorithm="brute", metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07))
    theirs.fit(unit(train, dim=1).double(), classes)
    expected = theirs.predict(unit(queries, dim=1).double())
    got = knn_predict(train, classes, queries, num_classes=4, chunk=17)
    assert (got.numpy() == expected).all()
    assert 0.5 < accuracy(got, blobs(100, 0.8, seed=1)[1]) < 1


def test_nearer_neighbours_weigh_more() -> None:
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    classes = torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.01]])
    assert knn_predict(train, classes, query, num_classes=2, k=3).item() == 0, "exp(0.2 / 0.07) = 17 times the vote"
    assert knn_predict(train, classes, query, num_classes=2, k=3, temperature=10.0).item() == 1


def test_knn_refuses_nothing_to_compare_with() -> None:
    with pytest.raises(ValueError, match="a class for each training image: 0 images, 0 classes"):
        knn_predict(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), torch.zeros(1, 3), num_classes=2)


def test_the_linear_probe_is_scikit_learns_optimum() -> None:
    features, classes = blobs(300, 1.0)
    probe = fit_linear_probe(features, classes, num_classes=4, weight_decay=1e-2)
    inputs = ((features.double() - probe.mean_C) / probe.std_C).numpy()
    theirs = LogisticRegression(C=1 / (300 * 1e-2), tol=1e-10, max_iter=2000).fit(inputs, classes)
    np.testing.assert_allclose(torch.softmax(probe.logits(features), 1).numpy(), theirs.predict_proba(inputs), atol=1e-4)


def test_the_linear_probe_does_not_depend_on_scale_or_shift_of_a_channel() -> None:
    features, classes = blobs(100, 1.0)
    moved = features * torch.tensor([1.0, 100, 1e-3, 5, 1, 1]) + 7
    one, two = (fit_linear_probe(each, classes, num_classes=4).logits(each) for each in (features, moved))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("probe", ["kNN", "linear", "segmentation", "confusion"])
def test_probes_refuse_classes_out_of_range(probe: str) -> None:
    features, classes = torch.randn(4, 2), torch.tensor([0, 1, 255, 3])
    masks = classes.to(torch.uint8).view(1, 2, 2)
    with pytest.raises(ValueError, match="expected classes from 0 to 2, got 0 to (3|255)"):
        if probe == "kNN":
            knn_predict(features, classes, features, num_classes=3)
        elif probe == "linear":
            fit_linear_probe(features, classes, num_classes=3)
        elif probe == "segmentation":
            fit_segmentation_probe(lambda: [PatchBatch(features[None], (2, 2), masks)], num_classes=3)
        else:
            confusion(torch.zeros(1, 2, 2, dtype=torch.int64), masks, 3)


def test_iou_is_scikit_learns_jaccard_score() -> None:
    generator = torch.Generator().manual_seed(0)
    actual, predicted = (torch.randint(5, (4, 30, 30), generator=generator, dtype=torch.uint8) for _ in range(2))
    matrix = confusion(predicted, actual, 6)
    expected = jaccard_score(actual.flatten(), predicted.flatten(), average=None)
    np.testing.assert_allclose(iou_by_class(matrix)[:5].numpy(), expected)
    assert mean_iou(matrix) == pytest.approx(expected.mean()), "a class that does not occur counts for nothing"


def test_iou_by_hand() -> None:
    actual = torch.tensor([[0, 0, 1, 1, 255]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 1, 1, 1, 0]])
    assert confusion(predicted, actual, 2).tolist() == [[1, 1], [0, 2]]
    assert mean_iou(confusion(predicted, actual, 2)) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert mean_iou(confusion(actual[:, :4], actual[:, :4], 2)) == 1


def patches(seed: int, noise: float) -> PatchBatch:
    """Features that hold the class of their patch, in masks twice as fine as the patches."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(3, (6, 8, 8), generator=generator)
    masks = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2).to(torch.uint8)
    masks[:, 0, 0] = 255
    features = torch.nn.functional.one_hot(coarse, 3).float() * 40 + 100
    return PatchBatch((features + noise * torch.randn(features.shape, generator=generator)).flatten(1, 2), (8, 8), masks)


def test_the_segmentation_probe_finds_what_is_there_and_nothing_in_noise() -> None:
    def fit(noise: float) -> float:
        probe = fit_segmentation_probe(lambda: [patches(0, noise), patches(1, noise)], num_classes=3, epochs=40, learning_rate=0.1)
        return mean_iou(evaluate_segmentation(probe, [patches(2, noise)], 3))

    # Enlarged by 2 the logits of neighbours mix, but the nearer patch always has the larger share.
    assert fit(0.0) > 0.99
    assert fit(1e4) < 0.4


def test_the_segmentation_probe_repeats_itself() -> None:
    one, two = (fit_segmentation_probe(lambda: [patches(0, 1.0)], num_classes=3, epochs=2, seed=5) for _ in range(2))
    assert torch.equal(one.classify.weight, two.classify.weight)
    with pytest.raises(ValueError, match="needs images with masks"):
        fit_segmentation_probe(lambda: [], num_classes=3)


def test_zero_shot_finds_the_nearest_text() -> None:
    table = {"cat": torch.tensor([1.0, 0.0]), "dog": torch.tensor([0.0, 1.0])}

    def tower(texts: list[str]) -> torch.Tensor:
        return torch.stack([next(vector for name, vector in table.items() if name in text) * len(text) for text in texts])

    classes = embed_classes(tower, ["cat", "dog"])
    torch.testing.assert_close(classes, torch.eye(2))
    assert zero_shot_predict(torch.tensor([[5.0, 1.0], [0.1, 0.2]]), classes).tolist() == [0, 1]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_elements = max(self.num_elements, result.numel())
        return result


def test_shares_of_classes_are_counted_without_a_picture_of_every_class() -> None:
    masks = torch.from_numpy(np.random.default_rng(0).choice([0, 3, 6, 255], (2, 8, 16)).astype(np.uint8))
    with LargestTensor() as largest:
        shares = class_shares(masks, 7, 4)
    assert shares.shape == (2, 7, 2, 4) and shares.dtype == torch.float32
    for row, column, index in np.ndindex(2, 4, 7):
        patches = masks[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert shares[:, index, row, column].tolist() == (patches == index).double().mean((1, 2)).tolist()
    assert largest.num_elements <= masks.numel()
