"""The products meant for GPUs train as the CPU's do, under the data-parallel wrapper that keeps the gradients."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_hybrid.ops.registry import select
from tests.vision_agglom.small import small_vision_run
from tests.vision_agglom.training import VisionReport, train_vision
from vision_agglom.config.schema import VisionConfig
from vision_agglom.students.biased_linear import biased_linear
from vision_agglom.students.ops import VisionOps, attention, layer_norm


def _gpu_ops(device: torch.device, dtype: torch.dtype) -> VisionOps:
    return VisionOps(select("linear", "cublas"), biased_linear, layer_norm, attention)


def train_with_gpu_ops(run: VisionConfig) -> VisionReport:
    with mock.patch("vision_agglom.students.build.vision_ops", _gpu_ops):
        return train_vision(run)


@pytest.mark.parametrize(
    "sections", [{}, {"parallel": {"recompute": "full"}, "student": {"spectral_reparam": True}}], ids=["plain", "recomputed"]
)
def test_products_that_add_to_the_gradient_train_alike(sections: dict, tmp_path: Path, run_ranks) -> None:
    """Two partitions, of which one leaves a teacher's heads out."""
    (expected,) = run_ranks(train_vision, 1, small_vision_run(tmp_path / "cpu", **sections))
    (report,) = run_ranks(train_with_gpu_ops, 1, small_vision_run(tmp_path / "gpu", **sections))
    np.testing.assert_allclose(report.losses, expected.losses, rtol=1e-5)
    np.testing.assert_allclose(report.grad_norms, expected.grad_norms, rtol=1e-4)
