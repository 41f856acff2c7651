"""The directory of checkpoints: complete or not there, verified, kept and let go, on one rank."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_hybrid.checkpoint import CheckpointError, CheckpointStore, load, read_header
from megatron_hybrid.checkpoint.manifest import Manifest
from megatron_hybrid.checkpoint.writing import ShardedWrite
from tests.checkpoint.small_state import is_step, small_state, whole_tensors

pytestmark = pytest.mark.usefixtures("single_rank")

FILES = [".metadata", "__0_0.distcp", "common.pt", "header.json", "manifest.json", "metadata.json"]


def make_store(directory: Path, *, keep_last: int | None = 2, asynchronous: bool = False) -> CheckpointStore:
    return CheckpointStore(directory, keep_last=keep_last, asynchronous=asynchronous)


def save_steps(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, small_state(step), {"step": step})


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def flip_a_bit(file: Path) -> None:
    """In the midst of a tensor's data where there is one, and of the file otherwise."""
    content = bytearray(file.read_bytes())
    in_data = content.find(whole_tensors(2)["cut"][50].numpy().tobytes())
    content[in_data if in_data > 0 else len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 2)


def test_a_checkpoint_has_these_files_and_comes_back(tmp_path: Path) -> None:
    store = make_store(tmp_path / "checkpoints")
    save_steps(store, 100)
    path = store.newest()
    assert names(tmp_path / "checkpoints") == ["latest", "step_00000100"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000100\n"
    assert names(path) == FILES
    assert read_header(path)["step"] == 100
    assert is_step(load(path, small_state(0)), 100)


def test_the_manifest_knows_every_tensor(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save_steps(store, 1)
    manifest = Manifest.read(store.newest())
    assert sorted(manifest.files) == [name for name in FILES if name != "manifest.json"]
    kinds = {key: (facts.shape, facts.dtype) for key, facts in manifest.tensors.items()}
    assert kinds == {"cut": ((96, 5), "float32"), "copied": ((7,), "bfloat16"), "optimizer.exp_avg": ((96, 5), "float32")}


def test_weights_load_without_the_optimizer(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save_steps(store, 3)
    loaded = load(store.newest(), {"model": small_state(0)["model"]})
    assert loaded.keys() == {"model"} and is_step(loaded, 3)


def test_megatron_core_reads_it_too(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save_steps(store, 3)
    assert is_step(dist_checkpointing.load(small_state(0), str(store.newest())), 3)


def test_loading_leaves_the_live_tensors_alone(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save_steps(store, 3)
    state = small_state(0)
    load(store.newest(), state)
    assert torch.equal(state["model"]["cut"].data, whole_tensors(0)["cut"])


def test_weights_of_another_precision_come_as_they_were_saved(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save_steps(store, 3)
    model = small_state(0)["model"]
    model["cut"].data, model["cut"].dtype = model["cut"].data.bfloat16(), torch.bfloat16
    assert is_step(load(store.newest(), {"model": model}), 3)


def test_an_empty_or_missing_directory_has_no_newest(tmp_path: Path) -> None:
    assert make_store(tmp_path).newest() is None
    assert make_store(tmp_path / "none").newest() is None


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, os.remove])
@pytest.mark.parametrize("file", FILES)
def test_damage_is_found_and_the_checkpoint_before_is_taken(
    file: str, damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path)
    save_steps(store, 1, 2)
    damaged = tmp_path / "step_00000002"
    damage(damaged / file)
    newest = store.newest()
    assert newest == tmp_path / "step_00000001" and is_step(load(newest, small_state(0)), 1)
    (message,) = warnings(caplog)
    assert "skipping checkpoint step_00000002" in message and str(damaged / file) in message
    assert ("missing" in message) == (damage is os.remove)
    with pytest.raises(CheckpointError, match=f"{damaged / file} is"):
        load(damaged, small_state(0))


def test_with_every_checkpoint_damaged_nothing_starts_anew(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save_steps(store, 1, 2)
    for path in tmp_path.glob("step_*"):
        flip_a_bit(path / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is sound \(step_00000002: .*; step_00000001: .*another run_dir"):
        store.newest()


def test_a_lost_checkpoint_is_missed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make_store(tmp_path)
    save_steps(store, 1, 2)
    shutil.rmtree(tmp_path / "step_00000002")
    assert store.newest() == tmp_path / "step_00000001"
    (message,) = warnings(caplog)
    assert "latest names step_00000002, which is not there" in message


def test_an_unfinished_checkpoint_is_skipped_and_cleared_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make_store(tmp_path)
    save_steps(store, 1)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000002.partial")
    assert store.newest() == tmp_path / "step_00000001"
    (message,) = warnings(caplog)
    assert "step_00000002.partial: it was never finished" in message
    save_steps(store, 3)
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000003"]


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [4]), (2, [3, 4]), (3, [2, 3, 4]), (None, [1, 2, 3, 4])])
def test_the_last_ones_are_kept(keep_last: int | None, kept: list[int], tmp_path: Path) -> None:
    save_steps(make_store(tmp_path, keep_last=keep_last), 1, 2, 3, 4)
    assert names(tmp_path) == ["latest", *(f"step_{step:08d}" for step in kept)]


def test_a_damaged_later_checkpoint_does_not_push_out_a_sound_one(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_last=1)
    save_steps(make_store(tmp_path, keep_last=None), 10, 20)
    flip_a_bit(tmp_path / "step_00000020" / "common.pt")
    save_steps(store, 15)
    assert store.newest() == tmp_path / "step_00000015"
    save_steps(store, 20)
    assert store.newest() == tmp_path / "step_00000020" and is_step(load(store.newest(), small_state(0)), 20)
    assert names(tmp_path) == ["latest", "step_00000020"]


def test_tensors_may_change_as_soon_as_an_asynchronous_save_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ShardedWrite.write
    monkeypatch.setattr(ShardedWrite, "write", lambda self: time.sleep(0.3) or write(self))
    store = make_store(tmp_path, asynchronous=True)
    state = small_state(1)
    live = [state["model"]["cut"].data, state["model"]["copied"].data, state["optimizer"]["state"][0]["exp_avg"].data]
    groups = state["optimizer"]["param_groups"]
    store.save(1, state, {})
    for tensor in live:
        tensor.zero_()
    groups[0]["lr"] = -1.0
    store.finish_pending(blocking=False)
    assert store.newest() is None, "complete before it was written"
    store.finish_pending(blocking=True)
    assert is_step(load(store.newest(), small_state(0)), 1)


def test_asynchronous_saves_are_finished_by_polling(tmp_path: Path) -> None:
    store = make_store(tmp_path, asynchronous=True)
    save_steps(store, 1)
    deadline_s = time.monotonic() + 30
    while not (tmp_path / "latest").exists():
        store.finish_pending(blocking=False)
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert store.newest() == tmp_path / "step_00000001"


def test_a_second_save_finishes_the_first(tmp_path: Path) -> None:
    store = make_store(tmp_path, asynchronous=True)
    save_steps(store, 1, 2)
    store.finish_pending(blocking=True)
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000002"]


def test_a_failed_asynchronous_write_is_an_error_of_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path, asynchronous=True)
    save_steps(store, 1)
    store.finish_pending(blocking=True)

    def fail(self: ShardedWrite) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ShardedWrite, "write", fail)
    save_steps(store, 2)
    with pytest.raises(CheckpointError, match="could not write step_00000002 .*Input/output error"):
        store.finish_pending(blocking=True)
    store.finish_pending(blocking=True)
    assert store.newest() == tmp_path / "step_00000001" and names(tmp_path) == ["latest", "step_00000001"]


class Usage(NamedTuple):
    free: int


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_noticed_before_anything_is_written(asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path, asynchronous=asynchronous)
    save_steps(store, 1)
    store.finish_pending(blocking=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free=1000))
    with pytest.raises(CheckpointError, match=rf"no space in {tmp_path} for step_00000002: [\d,]+ bytes needed, 1,000 available"):
        save_steps(store, 2)
    assert store.newest() == tmp_path / "step_00000001" and names(tmp_path) == ["latest", "step_00000001"]


def test_the_space_asked_for_is_enough_and_not_far_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path)
    needed = []
    make_room = CheckpointStore._make_room
    monkeypatch.setattr(CheckpointStore, "_make_room", lambda self, partial, size: needed.append(size) or make_room(self, partial, size))
    save_steps(store, 1)
    used = sum(file.stat().st_size for file in store.newest().iterdir())
    assert used <= needed[0] <= used + 20_000


def test_a_state_with_other_tensors_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save_steps(store, 1)
    state = small_state(0)
    state["model"]["cut"].key = "another"
    with pytest.raises(ValueError, match="does not have another: it is of another architecture"):
        load(store.newest(), state)


def test_a_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save_steps(store, 1)
    state = small_state(0)
    tensor = torch.zeros(3, 5)
    state["model"]["cut"] = type(state["model"]["cut"]).from_rank_offsets("cut", tensor)
    with pytest.raises(ValueError, match=r"another architecture: cut is \[96, 5\] there and \[3, 5\] here"):
        load(store.newest(), state)


def test_an_optimizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save_steps(store, 1)
    state = small_state(0)
    state["optimizer"]["param_state_sharding_type"] = "fully_reshardable"
    with pytest.raises(ValueError, match="optimizer state of another kind"):
        load(store.newest(), state)
