"""A checkpoint is read into any layout, bit for bit: weights, masters, moments and step counts of a real model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest

from megatron_hybrid.checkpoint import CheckpointStore, load
from megatron_hybrid.checkpoint.manifest import Manifest
from tests.checkpoint.training_state import Kind, Layout, TrainingState

PLAIN_FP32, PLAIN_BF16 = Kind("fp32", False), Kind("bf16", False)
DISTRIBUTED_FP32, DISTRIBUTED_BF16 = Kind("fp32", True), Kind("bf16", True)
KINDS = [PLAIN_FP32, PLAIN_BF16, DISTRIBUTED_FP32, DISTRIBUTED_BF16]
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
# fp32 has no masters, and otherwise the same paths.
SHORT_RING = [Layout(), Layout(pipeline=2, virtual_pipeline=2), Layout(tensor=2, data=2), Layout(pipeline=4), Layout()]


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


def refusal(directory: Path, kind: Kind) -> str:
    state = TrainingState(Layout(), kind, seed=1)
    try:
        load(directory / "step_00000000", state.sharded(is_loading=True))
    except ValueError as error:
        return str(error)
    return ""


def load_weights_elsewhere(directory: Path, layout: Layout, seed: int) -> list[str]:
    """Into the other precision and optimizer, where only weights can be compared, with the bf16 values they were saved in."""
    state = TrainingState(layout, PLAIN_FP32, seed=seed + 1)
    loaded = load(directory / "step_00000000", {"model": state.sharded_model()})["model"]
    known = {name.removesuffix(" weight"): value for name, _, value in state.values(seed) if name.endswith(" weight")}
    return [name for name, value in loaded.items() if not value.equal(known[name].to(value.dtype))]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind == KINDS[-1] else pytest.mark.slow) for kind in KINDS], ids=str)
def test_state_goes_through_every_layout_and_comes_back(kind: Kind, tmp_path: Path, run_ranks: Callable) -> None:
    ring = RING if kind.precision == "bf16" else SHORT_RING
    run_ranks(save_known, 1, tmp_path, ring[0], kind, 5)
    for step, layout in enumerate(ring[1:], start=1):
        for rank, differences in enumerate(run_ranks(load_and_pass_on, layout.num_ranks, tmp_path, step, layout, kind, 5)):
            assert not differences, f"{ring[step - 1]} -> {layout}, rank {rank}: {differences}"


def test_weights_alone_load_into_another_precision_and_layout(tmp_path: Path, run_ranks: Callable) -> None:
    run_ranks(save_known, 1, tmp_path, Layout(), DISTRIBUTED_BF16, 5)
    assert run_ranks(load_weights_elsewhere, 2, tmp_path, Layout(tensor=2), 5) == [[], []]


# The distributed optimizer keeps fp32 masters under one name in either precision, so those two fit each other.
UNFIT = [pair for pair in permutations(KINDS, 2) if not all(kind.distributed for kind in pair)]


@pytest.mark.parametrize(("saved", "here"), UNFIT, ids=str)
def test_optimizer_state_of_another_kind_is_refused(saved: Kind, here: Kind, tmp_path: Path, run_ranks: Callable) -> None:
    run_ranks(save_known, 1, tmp_path, Layout(), saved, 5)
    (message,) = run_ranks(refusal, 1, tmp_path, here)
    assert "another kind" in message


def test_keys_and_dtypes_are_the_documented_ones(tmp_path: Path, run_ranks: Callable) -> None:
    run_ranks(save_known, 1, tmp_path, Layout(), DISTRIBUTED_BF16, 5)
    tensors = Manifest.read(tmp_path / "step_00000000").tensors
    layers = {key.removeprefix("decoder.layers."): facts.dtype for key, facts in tensors.items() if key.startswith("decoder.layers.")}
    mamba = {key.removeprefix("0.mixer."): dtype for key, dtype in layers.items() if key.startswith("0.mixer.")}
    assert mamba == {
        **dict.fromkeys(["A_log", "D", "dt_bias"], "float32"),
        **dict.fromkeys([f"in_proj.weight.{part}" for part in ("z", "x", "B", "C", "dt")], "bfloat16"),
        **dict.fromkeys([f"conv1d.{name}.{part}" for name in ("weight", "bias") for part in ("x", "B", "C")], "bfloat16"),
        **dict.fromkeys(["in_proj.layer_norm_weight", "norm.weight", "out_proj.weight"], "bfloat16"),
    }
    assert {key for key in layers if key.startswith("3.")} == {
        f"3.self_attention.{name}" for name in ("linear_qkv.layer_norm_weight", "linear_qkv.weight", "linear_proj.weight")
    }
    outside = {"embedding.word_embeddings.weight", "decoder.final_norm.weight", "output_layer.weight"}
    assert outside == {key for key in tensors if not key.startswith(("decoder.layers.", "optimizer."))}
    weights = {key for key in tensors if not key.startswith("optimizer.")}
    states = {f"optimizer.state.{state}.{key}" for state in ("param", "exp_avg", "exp_avg_sq") for key in weights}
    assert {key: facts.dtype for key, facts in tensors.items() if key.startswith("optimizer.")} == dict.fromkeys(states, "float32")
