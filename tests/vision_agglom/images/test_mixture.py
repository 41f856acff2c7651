"""Which image a sample shows."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

from vision_agglom.config.images import ImagesConfig
from vision_agglom.images.mixture import Mixture


def mixture(scenes: Path, colours: Path, **options: object) -> Mixture:
    """Three parts scenes, one part colours."""
    sources = {"scenes": {"path": str(scenes), "weight": 3}, "colours": {"path": str(colours), "weight": 1}}
    return Mixture(ImagesConfig.model_validate({"sources": sources, **options}))


def first_choices(mixed: Mixture, count: int) -> list[tuple[int, int]]:
    """What samples show where nothing is damaged."""
    return [next(mixed.candidates(index)) for index in range(count)]


def test_sources_take_turns_by_weight(scenes: Path, colours: Path) -> None:
    counts = Counter(source for source, _ in first_choices(mixture(scenes, colours), 4096))
    assert counts == {0: 3072, 1: 1024}


def test_a_pass_over_a_source_shows_each_image_once_and_the_next_in_another_order(scenes: Path, colours: Path) -> None:
    shown = [number for source, number in first_choices(mixture(scenes, colours), 200) if source == 1]
    assert sorted(shown[:10]) == sorted(shown[10:20]) == list(range(10))
    assert shown[:10] != shown[10:20]


def test_the_order_belongs_to_the_seed(scenes: Path, colours: Path) -> None:
    assert first_choices(mixture(scenes, colours), 50) == first_choices(mixture(scenes, colours), 50)
    assert first_choices(mixture(scenes, colours), 50) != first_choices(mixture(scenes, colours, seed=5), 50)


def test_stand_ins_are_of_the_same_source_and_the_samples_own(scenes: Path, colours: Path) -> None:
    mixed = mixture(scenes, colours)
    scenes_alone = [index for index, (source, _) in enumerate(first_choices(mixed, 20)) if source == 0]
    first, second = (list(mixed.candidates(index)) for index in scenes_alone[:2])
    assert {source for source, _ in first + second} == {0}
    assert len({number for _, number in first}) > 3
    assert first[1:] != second[1:]
    assert first == list(pickle.loads(pickle.dumps(mixed)).candidates(scenes_alone[0]))


def test_the_fingerprint_names_what_decides_the_samples(scenes: Path, colours: Path) -> None:
    one = mixture(scenes, colours).fingerprint()
    assert one == mixture(scenes, colours).fingerprint()
    assert one["sources"]["scenes"]["num_images"] == 20
    assert one != mixture(scenes, colours, seed=5).fingerprint()
    assert one["sources"]["colours"]["digest"] != one["sources"]["scenes"]["digest"]
