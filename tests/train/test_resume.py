"""N steps = k steps + stop + N - k steps, bit for bit; and in another layout, the same loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hybrid.config import RunConfig
from megatron_hybrid.substrate.exit_codes import ExitCode
from tests.runs import small_run, write_corpus
from tests.train.training import Outcome, raised_by, train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("resume") / "text")


def make_run(
    corpus: Path, run_dir: Path, *, parallel: dict[str, Any], exit_after_steps: int | None = None, **train_options: Any
) -> RunConfig:
    return small_run(
        corpus.parent,
        run_dir=run_dir,
        parallel=parallel,
        optimizer={"lr": 1e-3},
        train={"exit_after_steps": exit_after_steps, **train_options},
    )


def ranks_of(run: RunConfig) -> int:
    return run.parallel.model_ranks * (run.parallel.data or 1)


def assert_same_state(resumed: Outcome, whole: Outcome) -> None:
    assert resumed.weights.keys() == whole.weights.keys()
    for name, values in whole.weights.items():
        assert torch.equal(resumed.weights[name], values), name
    assert len(resumed.optimizer) == len(whole.optimizer)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed.optimizer, whole.optimizer, strict=True))


@pytest.mark.parametrize(
    ("parallel", "precision", "distributed_optimizer"),
    [
        ({"data": 2}, "fp32", False),
        ({"data": 2}, "bf16", True),
        ({"tensor": 2, "sequence_parallel": True}, "bf16", True),
        *(
            pytest.param(parallel, precision, distributed, marks=pytest.mark.slow)
            for parallel, precision, distributed in (
                ({"data": 2}, "fp32", True),
                ({"data": 2}, "bf16", False),
                ({"tensor": 2, "sequence_parallel": True}, "fp32", True),
                ({"tensor": 2, "sequence_parallel": True}, "fp32", False),
                ({"tensor": 2, "sequence_parallel": True}, "bf16", False),
            )
        ),
    ],
    ids=str,
)
def test_resume_is_bitwise(parallel: dict, precision: str, distributed_optimizer: bool, corpus: Path, tmp_path: Path, run_ranks) -> None:
    check_resume({**parallel, "distributed_optimizer": distributed_optimizer}, precision, corpus, tmp_path, run_ranks)


def test_resume_is_bitwise_over_interleaved_stages(corpus: Path, tmp_path: Path, run_ranks) -> None:
    check_resume({"pipeline": 2, "virtual_pipeline": 2}, "bf16", corpus, tmp_path, run_ranks)


def test_resume_is_bitwise_with_overlapped_communication(corpus: Path, tmp_path: Path, run_ranks) -> None:
    check_resume({"data": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}, "bf16", corpus, tmp_path, run_ranks)


def check_resume(parallel: dict, precision: str, corpus: Path, tmp_path: Path, run_ranks) -> None:
    whole = run_ranks(train, 2, make_run(corpus, tmp_path / "whole", parallel=parallel, precision=precision))
    part = run_ranks(train, 2, make_run(corpus, tmp_path / "parts", parallel=parallel, precision=precision, exit_after_steps=2))
    rest = run_ranks(train, 2, make_run(corpus, tmp_path / "parts", parallel=parallel, precision=precision))
    for rank in range(2):
        assert part[rank].exit_code == ExitCode.STOPPED and rest[rank].exit_code == ExitCode.FINISHED
        assert rest[rank].first_step == part[rank].last_step == 2
        assert part[rank].losses + rest[rank].losses == whole[rank].losses
        assert part[rank].hashes + rest[rank].hashes == whole[rank].hashes
        assert_same_state(rest[rank], whole[rank])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"tensor": 2}, {"pipeline": 2}),
        ({"pipeline": 2}, {"data": 2}),
        pytest.param({"data": 2}, {}, marks=pytest.mark.slow),
        pytest.param({}, {"pipeline": 2, "virtual_pipeline": 2}, marks=pytest.mark.slow),
        ({"pipeline": 2, "virtual_pipeline": 2}, {"tensor": 2, "sequence_parallel": True}),
        ({"pipeline": 2, "stages": (3, 5)}, {"tensor": 2, "pipeline": 2}),
    ],
    ids=str,
)
def test_resume_in_another_layout(before: dict, after: dict, corpus: Path, tmp_path: Path, run_ranks) -> None:
    whole = run_ranks(train, 1, make_run(corpus, tmp_path / "whole", parallel={}))[0]
    first = make_run(corpus, tmp_path / "parts", parallel=before, exit_after_steps=2)
    second = make_run(corpus, tmp_path / "parts", parallel=after)
    losses = run_ranks(train, ranks_of(first), first)[0].losses + run_ranks(train, ranks_of(second), second)[0].losses
    np.testing.assert_allclose(losses, whole.losses, rtol=1e-6)


def test_mlp_layers_of_different_widths_are_saved_and_cut_anew(corpus: Path, tmp_path: Path, run_ranks) -> None:
    """And belong to this model alone: another's widths are refused."""

    def run_of(name: str, widths: list[int], parallel: dict, **options: Any) -> RunConfig:
        run_dir = tmp_path / name
        return small_run(corpus.parent, run_dir=run_dir, model={"ffn_hidden_size": widths}, parallel=parallel, train=options)

    whole = run_ranks(train, 1, run_of("whole", [96, 40], {}))[0]
    part = run_ranks(train, 2, run_of("parts", [96, 40], {"tensor": 2}, exit_after_steps=2))[0]
    (message,) = run_ranks(raised_by, 1, train, run_of("parts", [40, 96], {}))
    assert "ffn_hidden_size is [96, 40] there and [40, 96] here" in message
    rest = run_ranks(train, 2, run_of("parts", [96, 40], {"pipeline": 2}))[0]
    np.testing.assert_allclose(part.losses + rest.losses, whole.losses, rtol=1e-6)


def test_stream_goes_on_under_another_batch_size(corpus: Path, tmp_path: Path, run_ranks) -> None:
    """Position is a sample index: after 2 steps of 8, steps of 4 begin at sample 16, and two of them hash to one step of 8."""
    whole = run_ranks(train, 1, make_run(corpus, tmp_path / "whole", parallel={}))[0]
    run_ranks(train, 1, make_run(corpus, tmp_path / "parts", parallel={}, exit_after_steps=2))
    rest = run_ranks(train, 2, make_run(corpus, tmp_path / "parts", parallel={"data": 2}, global_batch_size=4, steps=10))[0]
    assert rest.first_step == 2 and rest.last_step == 8
    pairs = [(int(first, 16) + int(second, 16)) % 2**63 for first, second in zip(rest.hashes[::2], rest.hashes[1::2], strict=True)]
    assert [f"{number:016x}" for number in pairs] == whole.hashes[2:]


def test_weights_start_from_another_run(corpus: Path, tmp_path: Path, run_ranks) -> None:
    trained = run_ranks(train, 1, make_run(corpus, tmp_path / "first", parallel={}))[0]
    checkpoint = tmp_path / "first" / "checkpoints" / "step_00000005"
    options = make_run(corpus, tmp_path / "second", parallel={"tensor": 2}).model_dump()
    options["checkpoint"] = {"initialize_from": checkpoint}
    started = run_ranks(train, 2, RunConfig(**options))[0]
    assert started.first_step == 0
    assert started.losses[0] < trained.losses[0] - 0.01
