"""When a micro-batch's forward and backward can be one CUDA graph. Capturing itself needs a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hybrid.train.graph import graph_obstacle, make_graph
from tests.runs import small_run

ON_GPU, ON_CPU = (SimpleNamespace(device=torch.device(kind)) for kind in ("cuda", "cpu"))
CAPTURABLE, VARYING = (SimpleNamespace(is_capturable=capturable) for capturable in (True, False))


def test_pretraining_on_one_gpu_has_no_obstacle(tmp_path: Path) -> None:
    assert graph_obstacle(small_run(tmp_path), CAPTURABLE, ON_GPU) is None


@pytest.mark.parametrize(
    "parallel, task, substrate, reason",
    [
        ({}, CAPTURABLE, ON_CPU, "not on a GPU"),
        ({}, VARYING, ON_GPU, "does not launch the same kernels"),
        ({"pipeline": 2}, CAPTURABLE, ON_GPU, "parallel.pipeline=2"),
        ({"tensor": 2}, CAPTURABLE, ON_GPU, "parallel.tensor=2"),
        ({"overlap_grad_reduce": True}, CAPTURABLE, ON_GPU, "overlap_grad_reduce=true"),
        ({"recompute": "full"}, CAPTURABLE, ON_GPU, "recompute=full"),
    ],
)
def test_what_stands_in_the_way_is_said(tmp_path: Path, parallel: dict[str, Any], task: Any, substrate: Any, reason: str) -> None:
    run = small_run(tmp_path, parallel=parallel)
    assert reason in graph_obstacle(run, task, substrate)
    assert make_graph(run, task, [], substrate) is None
    asked = run.model_copy(update={"runtime": run.runtime.model_copy(update={"cuda_graphs": "on"})})
    with pytest.raises(ValueError, match=f"cuda_graphs=on cannot be had because .*{reason}"):
        make_graph(asked, task, [], substrate)


def test_off_is_off(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    off = run.model_copy(update={"runtime": run.runtime.model_copy(update={"cuda_graphs": "off"})})
    assert make_graph(off, CAPTURABLE, [], ON_GPU) is None
