"""When a micro-batch's forward and backward can be one CUDA graph, and what a step does with it.

Capturing itself needs a GPU: ``test_on_gpu.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hybrid.train.graph import MicroBatchGraph, graph_obstacle, make_graph
from megatron_hybrid.train.task import StepData
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


@dataclass
class Numbers:
    """A micro-batch; ``name`` is no tensor and takes no part in a graph."""

    values: torch.Tensor
    weights: torch.Tensor
    name: str


class ReplayedSum(MicroBatchGraph):
    """A graph whose replay, like a real one's, knows its own memory alone: it adds the weighted values to the gradient, and overwrites the
    metrics and the number of tokens of the replay before."""

    num_captures = 0

    def _capture(self, micro_batch: Numbers) -> None:
        self.num_captures += 1
        self._inputs = Numbers(micro_batch.values.clone(), micro_batch.weights.clone(), micro_batch.name)
        self._num_tokens, self._metrics = torch.zeros(()), {"loss": torch.zeros(2)}
        self._graph = self

    def replay(self) -> None:
        products = self._inputs.values * self._inputs.weights
        self.chunk.grad += products
        self._num_tokens.copy_(self._inputs.weights.sum())
        self._metrics["loss"].copy_(torch.stack((products.sum(), self._num_tokens)))


def test_a_step_replays_the_graph_for_each_micro_batch() -> None:
    micro_batches = [Numbers(torch.full((3,), float(n)), torch.tensor([1.0, 1.0, n]), f"number {n}") for n in range(4)]
    finished = []
    config = SimpleNamespace(finalize_model_grads_func=lambda chunks, tokens: finished.append((chunks, tokens.clone())))
    chunk = SimpleNamespace(config=config, grad=torch.zeros(3))
    graph = ReplayedSum(CAPTURABLE, chunk)
    assert not graph.is_captured
    for step in range(1, 3):
        metrics = graph.run(StepData(micro_batches, 4, 0))
        assert [each["loss"].tolist() for each in metrics] == [[n * (2 + n), 2 + n] for n in range(4)]
        assert chunk.grad.tolist() == [6 * step, 6 * step, 14 * step]
    assert graph.num_captures == 1 and graph.is_captured
    assert [(chunks == [chunk], int(tokens)) for chunks, tokens in finished] == [(True, 14), (True, 14)]
