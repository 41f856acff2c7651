"""ONNX in onnxruntime: backbone and every head, for any batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

from megatron_hybrid.substrate.exit_codes import ExitCode, RunError
from megatron_hybrid.substrate.failure import describe_failure
from tests.vision_agglom.export.conftest import make_radio
from vision_agglom.commands.export import write_formats
from vision_agglom.export import onnx as export


@pytest.mark.parametrize("is_large", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_onnxruntime_says_what_torch_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_large: bool) -> None:
    monkeypatch.setattr(export, "LARGEST_FILE_BYTES", 0 if is_large else 10**9)
    radio = make_radio(num_layers=1)
    path = tmp_path / "out/radio.onnx"
    assert export.write_onnx(radio, path, image_side=48) < 1e-5
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert sorted(file.name for file in path.parent.iterdir()) == ["radio.onnx", *(["radio.onnx.data"] if is_large else [])]
    assert [output.name for output in model.graph.output] == export.output_names(radio)
    assert export.output_names(radio)[:4] == ["summary", "features", "clip.summary", "clip.features"]
    assert "sam.summary" not in export.output_names(radio)
    assert model.opset_import[0].version == export.OPSET
    other = make_radio(num_layers=1)
    with torch.no_grad():
        other._feature_projections["sam"].final[2].bias += 1
    assert export.compare_onnx(other, path, 48) > 0.1, "another head would be seen"


def test_a_side_of_no_whole_patches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_side=50 is no multiple of the patch of 8 pixels"):
        export.write_onnx(make_radio(), tmp_path / "x.onnx", image_side=50)


def test_a_graph_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "compare_onnx", lambda *_: float("nan"))
    monkeypatch.setattr(torch.onnx, "export", lambda _model, _args, path, **_: Path(path).touch())
    for older in ("radio.onnx", "radio.onnx.data"):
        (tmp_path / older).touch()
    trained: Any = SimpleNamespace(radio=make_radio())
    with pytest.raises(RunError, match="differ from torch's by nan of the largest") as failure:
        write_formats(trained, tmp_path, 48, ["onnx"])
    assert not list(tmp_path.iterdir()), "nor is an older one, which would be taken for it"
    assert describe_failure(failure.value, write_formats)[0] == ExitCode.ERROR
