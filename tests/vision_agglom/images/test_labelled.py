"""Labels that probes cannot use are found before any image is looked at."""

from __future__ import annotations

import numpy as np
import pytest

from vision_agglom.images.labelled import check_labels
from vision_agglom.images.pack import encode_png
from vision_agglom.images.records import Record


class Collection(list):
    """Records in memory."""

    read = list.__getitem__


def labelled(class_index: int | None, mask: list[list[int]] | None) -> Record:
    return Record("x.png", b"no image", class_index, None if mask is None else encode_png(np.array(mask, np.uint8)))


def test_labels_within_the_classes() -> None:
    check_labels(Collection([labelled(2, [[0, 255], [2, 1]]), labelled(0, [[255, 255]] * 2)]), "held out", num_classes=3, resolution=2)


@pytest.mark.parametrize(
    ("record", "finding"),
    [
        (labelled(3, [[0]]), "x.png of held out: its class has class 3, but evaluation.num_classes=3 has those from 0 to 2"),
        (labelled(0, [[3]]), "x.png of held out: its mask has class 3"),
        (labelled(None, [[0]]), "x.png of held out has no class"),
        (labelled(0, None), "x.png of held out has no mask"),
    ],
)
def test_labels_that_probes_cannot_use(record: Record, finding: str) -> None:
    with pytest.raises(ValueError, match=finding):
        check_labels(Collection([labelled(0, [[0]]), record]), "held out", num_classes=3, resolution=1)
