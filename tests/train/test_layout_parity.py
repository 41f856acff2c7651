"""The same run in every layout: bitwise the same initial weights, the same data, and the same losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.config import RunConfig
from tests.runs import small_run, write_corpus
from tests.train.layouts import RankReport, assemble, train_in_layout

NUM_STEPS = 5

LAYOUTS = {
    "tp2": {"tensor": 2},
    "tp2-sp": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
    "dp2": {"data": 2},
    "dp2-plain": {"data": 2, "distributed_optimizer": False},
    "dp2-overlap": {"data": 2, "overlap_grad_reduce": True, "overlap_param_gather": True},
    "pp2-vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "pp2-uneven": {"pipeline": 2, "stages": (3, 5)},
    "full-recompute": {"recompute": "full"},
    "selective-recompute": {"recompute": "selective"},
    "plain-optimizer": {"distributed_optimizer": False},
    "tp4-sp": {"tensor": 4, "sequence_parallel": True},
    "pp4": {"pipeline": 4},
    "dp4": {"data": 4},
    "tp2-pp2-sp-full": {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "recompute": "full"},
    "tp2-pp2-vpp2-selective": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "recompute": "selective"},
    "tp2-dp2-sp": {"tensor": 2, "data": 2, "sequence_parallel": True},
    "pp2-dp2": {"pipeline": 2, "data": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    write_corpus(folder / "text")
    return folder


@pytest.fixture(scope="module")
def one_rank(folder: Path, rank_pool):
    return rank_pool.run(train_in_layout, 1, small_run(folder), NUM_STEPS)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_changes_nothing(layout: dict, folder: Path, one_rank, run_ranks) -> None:
    check(small_run(folder, parallel=layout), one_rank, run_ranks)


@pytest.mark.parametrize("pattern", ["MM---*|M-", "---M|*-MM", "M*|**|-M|M"])
def test_odd_patterns(pattern: str, folder: Path, run_ranks) -> None:
    """Runs of one kind, and stages cut at the marks, which one rank does not heed."""
    model, num_stages = {"pattern": pattern}, pattern.count("|") + 1
    reference = run_ranks(train_in_layout, 1, small_run(folder, model=model), NUM_STEPS)
    check(small_run(folder, model=model, parallel={"pipeline": num_stages}), reference, run_ranks)


@pytest.mark.parametrize(
    "layout",
    [{"tensor": 2, "sequence_parallel": True}, {"pipeline": 2, "recompute": "selective"}, {"tensor": 2, "pipeline": 2}, {"data": 2}],
    ids=str,
)
def test_mlp_layers_of_different_widths(layout: dict, folder: Path, run_ranks) -> None:
    model = {"ffn_hidden_size": [96, 40]}
    reference = run_ranks(train_in_layout, 1, small_run(folder, model=model), NUM_STEPS)
    assert assemble(reference, 1)["decoder.layers.5.mlp.linear_fc1.weight"].shape == (40, 64)
    check(small_run(folder, model=model, parallel=layout), reference, run_ranks)


def check(run: RunConfig, reference: list[RankReport], run_ranks) -> None:
    """Train in the run's layout and compare with one rank's report."""
    world_size = run.parallel.model_ranks * (run.parallel.data or 1)
    reports = run_ranks(train_in_layout, world_size, run, NUM_STEPS)
    expected = assemble(reference, 1)
    initial = assemble(reports, run.parallel.tensor)
    assert initial.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(initial[name], values, err_msg=name)
    for report in reports:
        assert report.hashes == reference[0].hashes
        np.testing.assert_allclose(report.losses, reference[0].losses, rtol=1e-5)
        np.testing.assert_allclose(report.grad_norms, reference[0].grad_norms, rtol=1e-4)
