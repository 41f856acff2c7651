"""The model's mathematics: documents kept apart, numerics policy, names, recomputation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_hybrid.config import RunConfig
from megatron_hybrid.layout.parameters import num_parameters
from megatron_hybrid.substrate.groups import shutdown
from tests.runs import MODEL, build_model, small_run


def leaks(run: RunConfig) -> dict[str, float]:
    """Change the first of two documents and see what the second one's losses and gradients notice; runs on a rank."""
    model, substrate = build_model(run)
    length, cut = 40, 17
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, MODEL["vocab_size"], (1, length), generator=generator).to(substrate.device)
    other = tokens.clone()
    other[:, :cut] = torch.randint(1, MODEL["vocab_size"], (1, cut), generator=generator).to(substrate.device)
    segments = (torch.arange(length, device=substrate.device)[None] >= cut).int()
    first, second = (model(each, segment_ids_BL=segments) for each in (tokens, other))
    apart = model(tokens[:, cut:])
    embedded = model.embedding.word_embeddings.weight
    embedded.grad = None
    model(tokens, segment_ids_BL=segments)[:, cut:].square().sum().backward()
    only_first = torch.tensor(sorted(set(tokens[0, :cut].tolist()) - set(tokens[0, cut:].tolist())))
    result = {
        "second_document": (first[:, cut:] - second[:, cut:]).abs().max().item(),
        "first_document": (first[:, :cut] - second[:, :cut]).abs().max().item(),
        "against_alone": (first[:, cut:] - apart).abs().max().item(),
        "gradient_of_first": embedded.grad[only_first].abs().max().item(),
    }
    shutdown(substrate)
    return result


@pytest.mark.parametrize("pattern", ["MMMM", "*-*-", "M-M*M-M*"])
def test_documents_do_not_see_each_other(pattern: str, tmp_path: Path, run_ranks) -> None:
    (found,) = run_ranks(leaks, 1, small_run(tmp_path, model={"pattern": pattern}))
    assert found["first_document"] > 1e-3, "the probe must change something"
    assert found["second_document"] == 0.0
    assert found["gradient_of_first"] == 0.0
    assert found["against_alone"] < 1e-5


def describe(run: RunConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of every parameter; runs on a rank."""
    model, substrate = build_model(run)
    found = {name: (tuple(parameter.shape), str(parameter.dtype)) for name, parameter in model.named_global_parameters()}
    shutdown(substrate)
    return found


def test_names_are_megatron_lms_and_ssm_parameters_stay_fp32(tmp_path: Path, run_ranks) -> None:
    run = small_run(tmp_path, train={"precision": "bf16"})
    (found,) = run_ranks(describe, 1, run)
    assert {
        "embedding.word_embeddings.weight",
        "decoder.layers.0.mixer.in_proj.layer_norm_weight",
        "decoder.layers.0.mixer.in_proj.weight",
        "decoder.layers.0.mixer.conv1d.weight",
        "decoder.layers.0.mixer.conv1d.bias",
        "decoder.layers.0.mixer.A_log",
        "decoder.layers.0.mixer.D",
        "decoder.layers.0.mixer.dt_bias",
        "decoder.layers.0.mixer.norm.weight",
        "decoder.layers.0.mixer.out_proj.weight",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.mlp.linear_fc1.weight",
        "decoder.layers.1.mlp.linear_fc2.weight",
        "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.3.self_attention.linear_qkv.weight",
        "decoder.layers.3.self_attention.linear_proj.weight",
        "decoder.final_norm.weight",
        "output_layer.weight",
    } <= found.keys()
    for name, (_, dtype) in found.items():
        expected = "torch.float32" if name.endswith(("A_log", "mixer.D", "dt_bias")) else "torch.bfloat16"
        assert dtype == expected, name
    assert sum(torch.Size(shape).numel() for shape, _ in found.values()) == num_parameters(run.model)


def saved_bytes(run: RunConfig) -> int:
    """Bytes that the forward pass keeps for the backward one; runs on a rank."""
    model, substrate = build_model(run)
    tokens = torch.randint(1, MODEL["vocab_size"], (4, 40), generator=torch.Generator().manual_seed(0)).to(substrate.device)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[id(storage._cdata)] = storage.nbytes()
        pinned.append(tensor)
        return tensor

    pinned: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, labels_BL=tokens, loss_mask_BL=torch.ones(tokens.shape, device=tokens.device))
    total = sum(
        {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in pinned
            if tensor.untyped_storage().data_ptr() not in parameters
        }.values()
    )
    loss.backward()
    shutdown(substrate)
    return total


def test_recomputation_saves_memory(tmp_path: Path, run_ranks) -> None:
    kept = {mode: run_ranks(saved_bytes, 1, small_run(tmp_path, parallel={"recompute": mode}))[0] for mode in ("none", "selective", "full")}
    assert kept["full"] < 0.5 * kept["selective"] < 0.5 * kept["none"], kept
