"""Float8 runs: the same scales on every rank and in every layout, bitwise resume, and what checkpoints carry over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.load import load_model
from megatron_hybrid.train.callbacks.float8 import describe_float8
from megatron_hybrid.train.callbacks.metrics_file import read_metrics
from tests.fp8.runs import NUM_LINEARS, Float8Outcome, float8_run, train_float8
from tests.runs import write_corpus

LAYOUTS = {
    "tp2": {"tensor": 2},
    "tp2-sp": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
    "pp2-vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "dp2": {"data": 2},
    "tp2-dp2-sp": {"tensor": 2, "data": 2, "sequence_parallel": True},
    "full-recompute": {"recompute": "full"},
    "selective-recompute": {"recompute": "selective"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float8")
    write_corpus(folder / "text")
    return folder


def ranks_of(run: RunConfig) -> int:
    return run.parallel.model_ranks * (run.parallel.data or 1)


def all_linears(outcomes: list[Float8Outcome], step: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Every linear's state after a step, checked to be the same wherever it is held."""
    states: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for outcome in outcomes:
        for name, state in outcome.scaling[step].items():
            known = states.setdefault(name, state)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(state, known, strict=True)), name
    return states


@pytest.fixture(scope="module")
def one_rank(folder: Path, rank_pool) -> list[Float8Outcome]:
    return rank_pool.run(train_float8, 1, float8_run(folder, run_dir=folder / "one"))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_changes_rounding_alone(layout: dict, folder: Path, tmp_path: Path, one_rank, run_ranks) -> None:
    """Another order of summation moves a tensor's element by 1e-7, and now and then over the edge between two float8 numbers."""
    run = float8_run(folder, run_dir=tmp_path / "run", parallel=layout)
    outcomes = run_ranks(train_float8, ranks_of(run), run)
    np.testing.assert_allclose(outcomes[0].losses, one_rank[0].losses, rtol=1e-4)
    for step, rtol in ((0, 1e-3), (3, 1e-2)):
        expected, states = all_linears(one_rank, step), all_linears(outcomes, step)
        assert states.keys() == expected.keys() and len(states) == NUM_LINEARS
        for name, (history_RH, scale_R) in states.items():
            torch.testing.assert_close(history_RH, expected[name][0], rtol=rtol, atol=0, msg=lambda text, name=name: f"{name}: {text}")
            torch.testing.assert_close(scale_R, expected[name][1], rtol=rtol, atol=0)
    if layout.get("recompute"):
        assert outcomes[0].losses == one_rank[0].losses


def test_window_rolls_once_per_optimizer_step(one_rank) -> None:
    """4 micro-batches a step, and after k < 4 steps k amaxes behind the empty slot."""
    for step, states in enumerate(one_rank[0].scaling[:3]):
        for history_RH, scale_R in states.values():
            assert (history_RH > 0).sum(1).tolist() == [step + 1] * 3
            assert history_RH[:, -1 - step :].gt(0).all()
            largest = torch.tensor([448.0, 448.0, 57344.0])
            torch.testing.assert_close(scale_R, largest / history_RH.amax(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "fp8", [{"recipe": "current", "delayed": {}}, {"format": "e4m3"}, {"delayed": {"history_length": 1, "reduction": "tensor"}}], ids=str
)
def test_other_recipes_stay_near_the_exact_run(fp8: dict, folder: Path, tmp_path: Path, run_ranks) -> None:
    (exact,) = run_ranks(train_float8, 1, float8_run(folder, run_dir=tmp_path / "exact", fp8={"recipe": "off"}))
    run = float8_run(
        folder, run_dir=tmp_path / "run", parallel={"tensor": 2, "sequence_parallel": True}, train={"precision": "bf16"}, fp8=fp8
    )
    outcomes = run_ranks(train_float8, 2, run)
    assert outcomes[0].losses != exact.losses
    np.testing.assert_allclose(outcomes[0].losses, exact.losses, rtol=2e-3)


@pytest.mark.parametrize(
    ("parallel", "reduction"),
    [({"data": 2}, "tensor"), ({"data": 2}, "tensor_data"), ({"tensor": 2, "sequence_parallel": True, "recompute": "full"}, "tensor_data")],
    ids=["dp2-own-amaxes", "dp2", "tp2-sp-full"],
)
def test_resume_is_bitwise(parallel: dict, reduction: str, folder: Path, tmp_path: Path, run_ranks) -> None:
    def make(name: str, **train: Any) -> RunConfig:
        fp8 = {"delayed": {"history_length": 4, "reduction": reduction}}
        return float8_run(folder, run_dir=tmp_path / name, parallel=parallel, fp8=fp8, train={"precision": "bf16", **train})

    whole = run_ranks(train_float8, 2, make("whole"))
    part = run_ranks(train_float8, 2, make("parts", exit_after_steps=2))
    rest = run_ranks(train_float8, 2, make("parts"))
    for rank in range(2):
        assert not rest[rank].messages
        assert part[rank].losses + rest[rank].losses == whole[rank].losses
        for name, values in whole[rank].outcome.weights.items():
            assert torch.equal(rest[rank].outcome.weights[name], values), name
        for name, state in whole[rank].scaling[-1].items():
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(rest[rank].scaling[-1][name], state, strict=True)), name


def test_state_goes_through_layouts(folder: Path, tmp_path: Path, run_ranks) -> None:
    """One step in each of four layouts: the first two slots of what the last one holds are, bit for bit, what the layouts before it saw."""
    outcomes = []
    for steps, parallel in enumerate(({}, {"tensor": 2}, {"pipeline": 2}, {"data": 2}), start=1):
        run = float8_run(folder, run_dir=tmp_path / "run", parallel=parallel, train={"steps": 4, "exit_after_steps": 1})
        outcomes.append(run_ranks(train_float8, ranks_of(run), run))
        assert outcomes[-1][0].outcome.last_step == steps and not outcomes[-1][0].messages
    histories = [{name: state[0] for name, state in all_linears(each, 0).items()} for each in outcomes]
    for name, last_RH in histories[-1].items():
        # Slots 1 to 3 are the last three steps; each step's amax has moved down one slot per step since.
        for steps_since in (1, 2):
            assert torch.equal(last_RH[:, -1 - steps_since], histories[-1 - steps_since][name][:, -1]), name


def test_precision_may_change_between_starts(folder: Path, tmp_path: Path, run_ranks) -> None:
    def go_on(**fp8: Any) -> Float8Outcome:
        (outcome,) = run_ranks(
            train_float8, 1, float8_run(folder, run_dir=tmp_path / "run", fp8=fp8, train={"steps": 9, "exit_after_steps": 1})
        )
        return outcome

    assert not go_on(recipe="off").messages
    assert go_on().messages == ["the checkpoint has no float8 scaling state: amax histories start empty and scales at 1"]
    assert not go_on().messages
    (message,) = go_on(format="e4m3").messages
    assert "format is hybrid there and e4m3 here" in message and "start empty" in message
    (message,) = go_on(format="e4m3", bf16_layers_at_start=1).messages
    assert message.endswith(
        "scaling state of decoder.layers.0.mixer.in_proj, decoder.layers.0.mixer.out_proj is ignored: they are not in float8 here"
    )
    (message,) = go_on(format="e4m3").messages
    assert message.startswith(
        "the checkpoint has no float8 scaling state of decoder.layers.0.mixer.in_proj, decoder.layers.0.mixer.out_proj"
    )
    assert go_on(recipe="current", delayed={}).messages == ["the checkpoint's float8 scaling state is ignored: this run keeps none"]
    assert not go_on(recipe="off").messages


def test_own_amaxes_need_the_same_data_ranks(folder: Path, tmp_path: Path, run_ranks) -> None:
    fp8 = {"delayed": {"history_length": 4, "reduction": "tensor"}}
    run_ranks(train_float8, 2, float8_run(folder, run_dir=tmp_path / "run", fp8=fp8, parallel={"data": 2}, train={"exit_after_steps": 1}))
    (outcome,) = run_ranks(train_float8, 1, float8_run(folder, run_dir=tmp_path / "run", fp8=fp8, train={"exit_after_steps": 1}))
    (message,) = outcome.messages
    assert "data_ranks is 2 there and 1 here" in message


@pytest.mark.parametrize(
    "parallel", [{"pipeline": 2}, {"data": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}], ids=["pp2", "dp2-overlap"]
)
def test_reports(parallel: dict, folder: Path, tmp_path: Path, run_ranks) -> None:
    fp8 = {"telemetry_every_steps": 2, "shadow_every_steps": 2, "bf16_layers_at_start": 1}
    run = float8_run(folder, run_dir=tmp_path / "run", parallel=parallel, fp8=fp8)
    watched = run_ranks(train_logged, ranks_of(run), run)
    unwatched = run_ranks(
        train_float8, ranks_of(run), float8_run(folder, run_dir=tmp_path / "plain", parallel=parallel, fp8={"bf16_layers_at_start": 1})
    )
    assert watched[0].losses == unwatched[0].losses, "watching must not change the run"
    lines = read_metrics(run.run_dir / "metrics.jsonl")
    telemetry = [line for line in lines if line["kind"] == "fp8"]
    assert [line["step"] for line in telemetry] == [2, 4]
    for line in telemetry:
        assert line["linears"].keys() == all_linears(watched, 0).keys()
        for name, roles in line["linears"].items():
            history_RH, _ = all_linears(watched, line["step"] - 1)[name]
            assert [roles[role]["amax"] for role in ("input", "weight", "grad_output")] == history_RH[:, -1].tolist()
            _, scale_R = all_linears(watched, line["step"] - 2)[name]
            assert [roles[role]["scale"] for role in ("input", "weight", "grad_output")] == scale_R.tolist()
            assert all(0 <= role["saturated"] < 0.1 and 0 <= role["flushed"] < 0.5 for role in roles.values())
    losses = {line["step"]: line["metrics"]["loss"] for line in lines if line["kind"] == "step"}
    shadows = [line for line in lines if line["kind"] == "fp8_shadow"]
    assert [line["step"] for line in shadows] == [2, 4]
    for line in shadows:
        assert line["loss"] == losses[line["step"]] != line["exact_loss"]
        assert line["relative_gap"] == (line["exact_loss"] - line["loss"]) / line["exact_loss"]
        assert abs(line["relative_gap"]) < 2e-3


def train_logged(run: RunConfig) -> Float8Outcome:
    return train_float8(run, logged=True)


def test_shadow_is_the_exact_loss(folder: Path, tmp_path: Path, run_ranks) -> None:
    """At the first step both runs have the same weights."""
    (exact,) = run_ranks(train_float8, 1, float8_run(folder, run_dir=tmp_path / "exact", fp8={"recipe": "off"}))
    run = float8_run(folder, run_dir=tmp_path / "run", fp8={"shadow_every_steps": 1})
    run_ranks(train_logged, 1, run)
    shadow = next(line for line in read_metrics(run.run_dir / "metrics.jsonl") if line["kind"] == "fp8_shadow")
    assert shadow["exact_loss"] == exact.losses[0]


def test_the_start_says_what_runs_in_float8(folder: Path) -> None:
    model = load_model("nemotron-h-4b")[0].model_dump()
    run = float8_run(folder, model=model, parallel={"tensor": 2}, fp8={"bf16_layers_at_start": 2, "bf16_layers_at_end": 2})
    summary, exception = describe_float8(run, torch.device("cpu"))
    scaling = "delayed scaling (max of 4 steps, margin 0, amaxes over tensor and data ranks)"
    assert summary.startswith(f"float8: 74 of 104 linears, hybrid, {scaling}, emulated products; ")
    assert "the first 2 and last 2 layers, embedding and output layer stay in fp32" in summary
    assert exception == "float8: in_proj stays in fp32: 8248 x 3072 per rank at parallel.tensor=2, not multiples of 16"
    assert len(describe_float8(float8_run(folder, model=model), torch.device("cpu"))) == 1
