"""The same distillation in every layout: bitwise the same initial weights, the same data, losses and statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.layouts import assemble
from tests.vision_agglom.small import small_vision_run
from tests.vision_agglom.training import VisionReport, train_vision
from vision_agglom.config.schema import VisionConfig

LAYOUTS = {
    "tp2": {"tensor": 2},
    "tp2-sp": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
    "dp2": {"data": 2},
    "dp2-overlap": {"data": 2, "overlap_grad_reduce": True, "overlap_param_gather": True},
    "pp2-vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "full-recompute": {"recompute": "full"},
    "selective-recompute": {"recompute": "selective"},
}
MORE_LAYOUTS = {
    "pp2-uneven": {"pipeline": 2, "stages": (3, 1)},
    "dp2-plain": {"data": 2, "distributed_optimizer": False},
    "tp2-pp2-sp-full": {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "recompute": "full"},
    "tp2-dp2-sp": {"tensor": 2, "data": 2, "sequence_parallel": True},
    "pp2-dp2": {"pipeline": 2, "data": 2},
}

EVERYTHING = {
    "student": {
        "spectral_reparam": True,
        "damp_std": 0.05,
        "windows": {"sizes": [2, 3, 5], "num_global_blocks": 2},
        "layer_scale": 0.1,
        "final_norm": True,
        "mlp": "swiglu",
        "position_dropout": 0.3,
    },
    "loss": {"balance": "uncertainty", "shift_patches": 2},
    "heads": {"num_inner": 1},
}
"""Every option of the student that could depend on the cut."""


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, rank_pool) -> list[VisionReport]:
    return rank_pool.run(train_vision, 1, small_vision_run(tmp_path_factory.mktemp("one")))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_changes_nothing(layout: dict[str, Any], tmp_path: Path, one_rank, run_ranks) -> None:
    check(small_vision_run(tmp_path, parallel=layout), one_rank[0], run_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("layout", MORE_LAYOUTS.values(), ids=MORE_LAYOUTS)
def test_more_layouts_change_nothing(layout: dict[str, Any], tmp_path: Path, one_rank, run_ranks) -> None:
    check(small_vision_run(tmp_path, parallel=layout), one_rank[0], run_ranks)


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", pytest.param("dp2", marks=pytest.mark.slow)])
def test_layout_changes_nothing_with_everything_on(layout: str, tmp_path: Path, run_ranks) -> None:
    (reference,) = run_ranks(train_vision, 1, small_vision_run(tmp_path / "one", **EVERYTHING))
    check(small_vision_run(tmp_path / "other", parallel=LAYOUTS[layout], **EVERYTHING), reference, run_ranks)


@pytest.mark.parametrize("layout", ["dp2", pytest.param("tp2-sp", marks=pytest.mark.slow)])
def test_layout_changes_nothing_with_mesa_and_adaloss(layout: str, tmp_path: Path, run_ranks) -> None:
    loss = {"balance": "adaloss", "mesa": {"weight": 0.5, "momentum": 0.9}, "shift_patches": 1}
    (reference,) = run_ranks(train_vision, 1, small_vision_run(tmp_path / "one", loss=loss))
    assert reference.metrics[-1]["mesa"] > 0
    check(small_vision_run(tmp_path / "other", parallel=LAYOUTS[layout], loss=loss), reference, run_ranks)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_that_divide_the_teachers_train_alike(num_ranks: int, tmp_path: Path, one_rank, run_ranks) -> None:
    """Fewer ranks than teachers, and more."""
    train = {"teacher_ranks": "partitioned", "teacher_costs": {"clip": 1.0, "dino": 2.0, "sam": 5.0}}
    check(small_vision_run(tmp_path, parallel={"data": num_ranks}, train=train), one_rank[0], run_ranks, 1e-6)


def check(run: VisionConfig, reference: VisionReport, run_ranks, tolerance: float = 1e-9) -> None:
    """Train in the run's layout and compare with one rank's report.

    Statistics agree to ``tolerance``, far below fp32: rounding of fp64 sums. Teachers that see other batches round differently themselves.
    """
    reports = run_ranks(train_vision, run.parallel.model_ranks * (run.parallel.data or 1), run)
    expected, initial = assemble([reference], 1), assemble(reports, run.parallel.tensor)
    assert initial.keys() == expected.keys()
    for name, values in expected.items():
        if name.endswith("spectral.scale"):
            # Singular values, from products that are summed over the cut.
            np.testing.assert_allclose(initial[name], values, rtol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(initial[name], values, err_msg=name)
    for report in reports:
        assert report.hashes == reference.hashes
        np.testing.assert_allclose(report.losses, reference.losses, rtol=1e-5)
        np.testing.assert_allclose(report.grad_norms, reference.grad_norms, rtol=1e-4)
        for here, there in zip(report.metrics, reference.metrics, strict=True):
            np.testing.assert_allclose(list(here.values()), list(there.values()), rtol=1e-4)
        for name, values in report.state.items():
            scale = np.abs(reference.state[name]).max()
            allowed = tolerance if name.startswith("targets.") else 1e-4
            np.testing.assert_allclose(values, reference.state[name], rtol=0, atol=allowed * max(scale, 1e-12), err_msg=name)
