"""The table of names is complete on both sides: against the declarations of our layers, and against transformers' own state dict."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from megatron_hybrid.config import RunConfig
from megatron_hybrid.convert.correspondence import correspondences
from megatron_hybrid.convert.hub_config import model_from_hub
from megatron_hybrid.layout.parameters import num_parameters
from tests.convert.checkpoints import BASE, CONFIG, SHAPES
from tests.runs import build_model, small_run

OTHER = {"vocab_size": 256, "mamba_conv_width": 6, "mamba_head_dim": 80, "num_kv_heads": 1, "mamba_num_groups": 1}
Described = dict[str, tuple[tuple[int, ...], int | None, bool]]


def declared_tensors(run: RunConfig) -> Described:
    """Key -> (shape, cut dimension, kept in fp32) of a bf16 model, by what its layers declare; runs on a rank."""
    model, _ = build_model(run)
    found: Described = {}
    for name, parameter in model.named_global_parameters():
        declaration, is_fp32 = parameter.declaration, parameter.dtype == torch.float32
        for component in declaration.components if len(declaration.components) > 1 else ():
            found[f"{name}.{component.name}"] = ((component.size, *declaration.global_shape[1:]), declaration.axis, is_fp32)
        if len(declaration.components) < 2:
            found[name] = (declaration.global_shape, declaration.axis, is_fp32)
    return found


@pytest.mark.parametrize("changes", [{}, OTHER], ids=["plain", "other sizes"])
def test_native_side_is_what_the_layers_declare(changes: dict[str, Any], tmp_path: Path, run_ranks) -> None:
    run = small_run(tmp_path, model=changes, train={"precision": "bf16"})
    (declared,) = run_ranks(declared_tensors, 1, run)
    table = {tensor.key: (tensor.shape, tensor.axis, each.is_fp32) for each in correspondences(run.model) for tensor in each.native}
    assert table == declared
    assert sum(prod(shape) for shape, _, _ in table.values()) == num_parameters(run.model)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_hub_side_is_what_transformers_has(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        theirs = NemotronHForCausalLM(NemotronHConfig(**{**BASE, **changes})).state_dict()
    model = model_from_hub({**CONFIG, **changes})
    assert {tensor.name: tensor.shape for each in correspondences(model) for tensor in each.hub} == {
        name: tuple(tensor.shape) for name, tensor in theirs.items()
    }
