"""A checkpoint is read into any layout, bit for bit: weights, masters, moments and step counts of a real model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hybrid.checkpoint import CheckpointStore, load
from tests.checkpoint.training_state import Kind, Layout, TrainingState

KINDS = [Kind(precision, distributed) for precision in ("fp32", "bf16") for distributed in (False, True)]
# Every change of one size and several changes at once; dt_bias, in_proj and conv1d cross pipeline cuts and change their tensor cut.
RING = [
    Layout(),
    Layout(tensor=2),
    Layout(pipeline=2),
    Layout(pipeline=2, virtual_pipeline=2),
    Layout(tensor=2, pipeline=2),
    Layout(data=4),
    Layout(pipeline=2, data=2),
    Layout(tensor=4),
    Layout(pipeline=4),
    Layout(tensor=2, data=2),
    Layout(data=2),
    Layout(),
]


def save_known(directory: Path, layout: Layout, kind: Kind, seed: int) -> None:
    state = TrainingState(layout, kind, seed=seed)
    state.fill(seed)
    CheckpointStore(directory, keep_last=2, asynchronous=False).save(0, state.sharded(is_loading=False), {"kind": str(kind)})


def load_and_pass_on(directory: Path, step: int, layout: Layout, kind: Kind, seed: int) -> list[str]:
    state = TrainingState(layout, kind, seed=seed + 1)
    store = CheckpointStore(directory, keep_last=2, asynchronous=step % 2 == 0)
    state.take(load(store.newest(), state.sharded(is_loading=True)))
    differences = state.differences(seed)
    store.save(step, state.sharded(is_loading=False), {"kind": str(kind)})
    store.finish_pending(blocking=True)
    return differences


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_state_goes_through_every_layout_and_comes_back(kind: Kind, tmp_path: Path, run_ranks: Callable) -> None:
    run_ranks(save_known, 1, tmp_path, RING[0], kind, 5)
    for step, layout in enumerate(RING[1:], start=1):
        for rank, differences in enumerate(run_ranks(load_and_pass_on, layout.num_ranks, tmp_path, step, layout, kind, 5)):
            assert not differences, f"{RING[step - 1]} -> {layout}, rank {rank}: {differences}"
