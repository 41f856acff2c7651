"""The stream of a run: the same samples in every layout, resumed by one number, damaged images passed over by name."""

from __future__ import annotations

import itertools
import logging
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from vision_agglom.config.images import ImagesConfig
from vision_agglom.contract import ImageBatch
from vision_agglom.images.pack import encode_jpeg, write_shards
from vision_agglom.images.records import Record
from vision_agglom.images.stream import ImageStream


def config(path: Path, **options: object) -> ImagesConfig:
    """One source, decoded in this process unless an option says otherwise."""
    return ImagesConfig.model_validate({"sources": {"x": {"path": str(path)}}, "num_workers": 0, **options})


def take(options: ImagesConfig, count: int, **layout: object) -> list[ImageBatch]:
    """The first micro-batches of a rank."""
    with ImageStream(options, **{"resolution": 16, "micro_batch": 4, **layout}) as stream:
        return list(itertools.islice(stream, count))


def by_index(batches: list[ImageBatch]) -> dict[int, torch.Tensor]:
    """Sample index -> image."""
    return {int(index): image for batch in batches for index, image in zip(batch.sample_indices_B, batch.images_BCHW)}


def assert_same(one: dict[int, torch.Tensor], two: dict[int, torch.Tensor]) -> None:
    """Bitwise the same images at the same indices."""
    assert one.keys() == two.keys()
    assert all(torch.equal(one[index], two[index]) for index in one)


def test_a_batch_is_what_the_contract_says(scenes: Path) -> None:
    (batch,) = take(config(scenes), 1)
    assert batch.images_BCHW.shape == (4, 3, 16, 16) and batch.images_BCHW.dtype == torch.float32
    assert 0 <= batch.images_BCHW.min() < 0.3 and 0.7 < batch.images_BCHW.max() <= 1
    assert batch.sample_indices_B.tolist() == [0, 1, 2, 3] and batch.sample_indices_B.dtype == torch.int64
    assert batch.resolution == 16


@pytest.mark.parametrize(("data_size", "micro_batch"), [(1, 12), (2, 3), (3, 4), (4, 1)])
def test_every_layout_shows_the_same_samples(scenes: Path, data_size: int, micro_batch: int) -> None:
    alone = by_index(take(config(scenes), 6))
    layout = {"data_size": data_size, "micro_batch": micro_batch}
    rounds = 24 // (data_size * micro_batch)
    ranks = [by_index(take(config(scenes), rounds, data_rank=rank, **layout)) for rank in range(data_size)]
    assert sum(map(len, ranks)) == 24
    assert_same(alone, {index: image for rank in ranks for index, image in rank.items()})


def test_resuming_goes_on_at_the_position(scenes: Path) -> None:
    whole = by_index(take(config(scenes), 6, data_rank=1, data_size=2))
    with ImageStream(config(scenes), resolution=16, micro_batch=4, data_rank=1, data_size=2) as stream:
        before = by_index(list(itertools.islice(stream, 2)))
        position = stream.position
    assert position == 16
    after = by_index(take(config(scenes), 4, data_rank=1, data_size=2, first_sample=position))
    assert_same(whole, before | after)


def test_workers_change_nothing(scenes: Path) -> None:
    assert_same(by_index(take(config(scenes), 7)), by_index(take(config(scenes, num_workers=2, batches_ahead=2), 7)))


def test_workers_leave_interrupts_to_the_process_that_reads(scenes: Path) -> None:
    """A terminal sends Ctrl-C to workers too, even while they start."""
    with ImageStream(config(scenes, num_workers=1), resolution=16, micro_batch=4) as stream:
        first = by_index([next(stream)])
        (worker,) = stream._batches._workers  # type: ignore[union-attr]
        os.kill(worker.pid, signal.SIGINT)
        more = by_index(list(itertools.islice(stream, 6)))
    assert_same(first | more, by_index(take(config(scenes), 7)))
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_beginning_to_read_leaves_the_global_generator_alone(scenes: Path) -> None:
    before = torch.get_rng_state()
    take(config(scenes), 1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_resolution_may_be_chosen_by_position_the_same_on_every_rank(scenes: Path) -> None:
    seen: list[int] = []

    def choose(position: int) -> int:
        seen.append(position)
        return 16 if position % 16 else 32

    for rank in range(2):
        batches = take(config(scenes), 3, resolution=choose, data_rank=rank, data_size=2)
        assert [batch.resolution for batch in batches] == [32, 16, 32]
        assert [batch.images_BCHW.shape[-1] for batch in batches] == [32, 16, 32]
    assert seen == [0, 8, 16] * 2


def test_other_resolutions_show_the_same_region(scenes: Path) -> None:
    small, large = (by_index(take(config(scenes), 3, resolution=side)) for side in (16, 32))
    for index in small:
        shrunk = torch.nn.functional.avg_pool2d(large[index], 2)
        assert (shrunk - small[index]).abs().mean() < 0.05


@pytest.fixture
def partly_damaged(tmp_path: Path) -> Path:
    """12 images of one colour each, two of them cut short."""
    images = [encode_jpeg(np.full((40, 60, 3), 20 * number, np.uint8)) for number in range(12)]
    images[3], images[7] = images[3][:60], b"no image"
    return write_shards([Record("x.jpg", image) for image in images], tmp_path / "x", 100)[0]


def test_damaged_images_are_counted_and_named_and_others_stand_in(partly_damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = config(partly_damaged, flip_probability=0)
    with caplog.at_level(logging.WARNING), ImageStream(options, resolution=8, micro_batch=12) as stream:
        shown = [round(float(image.mean()) * 255 / 20) for batch in itertools.islice(stream, 2) for image in batch.images_BCHW]
        damaged = dict(stream.damaged)
    assert sorted(name.split("/")[-1].split(":")[0] for name in damaged) == ["00000003.jpg", "00000007.jpg"]
    assert sum(damaged.values()) >= 4, "each is met in each of two passes, and may stand in once more"
    assert caplog.text.count("damaged image passed over") == 2, "logged once each"
    assert f"2 damaged images were passed over, {sum(damaged.values())} times in all" in caplog.text
    assert not {3, 7} & set(shown) and len(shown) == 24


def test_damage_moves_no_other_sample_and_is_the_same_in_every_layout(partly_damaged: Path, tmp_path: Path) -> None:
    (tmp_path / "sound").mkdir()
    images = [encode_jpeg(np.full((40, 60, 3), 20 * number, np.uint8)) for number in range(12)]
    sound = write_shards([Record("x.jpg", image) for image in images], tmp_path / "sound/x", 100)[0]
    one, other = (by_index(take(config(path), 6)) for path in (sound, partly_damaged))
    damaged = {index for index, image in one.items() if round(float(image.mean()) * 255 / 20) in (3, 7)}
    assert damaged and all(torch.equal(one[index], other[index]) for index in one if index not in damaged)
    ranks = [by_index(take(config(partly_damaged), 3, data_rank=rank, data_size=2)) for rank in range(2)]
    assert_same(other, ranks[0] | ranks[1])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_collection_that_is_all_damage_is_refused(tmp_path: Path, num_workers: int) -> None:
    shard = write_shards([Record("x.jpg", b"no image")] * 3, tmp_path / "x", 100)[0]
    with pytest.raises(ValueError, match=r"source 'x': 17 images drawn for sample 0 are all damaged, the last one .*x-00000.tar/0000000"):
        take(config(shard, num_workers=num_workers), 1)


def test_the_fingerprint_holds_what_a_resumed_run_must_keep(scenes: Path) -> None:
    def fingerprint(**options: object) -> dict[str, object]:
        with ImageStream(config(scenes, **options), resolution=16, micro_batch=4) as stream:
            return stream.fingerprint()

    assert fingerprint() == fingerprint(num_workers=1)
    assert fingerprint() != fingerprint(crop_scale=(0.1, 0.2))
    assert fingerprint() != fingerprint(seed=1)


@pytest.mark.parametrize("layout", [{"data_rank": 2, "data_size": 2}, {"micro_batch": 0}, {"first_sample": -1}])
def test_a_layout_that_makes_no_sense_is_refused(scenes: Path, layout: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= data_rank < data_size"):
        take(config(scenes), 1, **layout)
