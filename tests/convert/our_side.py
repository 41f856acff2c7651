"""What a converted model of ours computes, on one rank or in shards; apart from transformers, which every rank would have to import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import distributed

from megatron_hybrid.checkpoint import load
from megatron_hybrid.checkpoint.sharding import shard_parameters
from megatron_hybrid.config import RunConfig
from megatron_hybrid.convert.correspondence import correspondences
from megatron_hybrid.convert.hub import HubSource
from megatron_hybrid.convert.native import NativeSource
from megatron_hybrid.convert.source import read_as
from megatron_hybrid.generate.engine import Engine, Start
from megatron_hybrid.generate.sampling import Sampling
from megatron_hybrid.generate.stages import Stages
from megatron_hybrid.model.hybrid import HybridModel
from tests.runs import VOCAB_SIZE, build_model
from tests.train.layouts import RankReport, Shard, _picklable

TOKENS_BL = torch.randint(VOCAB_SIZE, (2, 41), generator=torch.Generator().manual_seed(1))
"""More than two chunks of 16."""
NUM_NEW_TOKENS = 24
Found = dict[str, Any]


def our_side(path: Path, run: RunConfig) -> Found:
    """Logits, gradients by parameter and greedy tokens of the model in a Hugging Face directory; runs on a rank."""
    source = HubSource(path)
    run = run.model_copy(update={"model": source.model})
    model, _ = build_model(run)
    parameters = dict(model.named_global_parameters())
    with torch.no_grad():
        for each in correspondences(source.model):
            tensors = read_as("native", source, each, torch.float32, source.model)
            parameters.pop(each.parameter).copy_(torch.cat(tensors))
    assert not parameters
    logits_BLV = model(TOKENS_BL[:, :-1])
    loss_of(logits_BLV).backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_global_parameters()}
    return {"logits": logits_BLV.detach().numpy(), "gradients": gradients, "greedy": greedy(model.eval(), source.model.vocab_size)}


def our_side_in_shards(path: Path, run: RunConfig) -> tuple[RankReport, Found]:
    """This rank's gradients, and what the last stage sees, of a run directory loaded as training does; two stages."""
    model, substrate = build_model(run)
    stages, group = Stages.of(substrate), substrate.pipeline_group
    sharded = shard_parameters(model.named_global_parameters(), substrate.tensor_group, substrate.data_group)
    weights = load(NativeSource(path).path, {"model": sharded}, group=substrate.control_group)["model"]
    with torch.no_grad():
        for name, parameter in model.named_global_parameters():
            parameter.copy_(weights[name])
    tokens_BL = TOKENS_BL[:, :-1]
    shape = (tokens_BL.shape[1], tokens_BL.shape[0], run.model.hidden_size)
    if stages.is_first:
        hidden_LBD = model(tokens_BL)
        stages.send(hidden_LBD.detach())
        gradient_LBD = torch.empty(shape)
        distributed.recv(gradient_LBD, distributed.get_global_rank(group, 1), group=group)
        hidden_LBD.backward(gradient_LBD)
        found = {}
    else:
        received_LBD = stages.receive(shape, torch.float32, substrate.device).requires_grad_()
        model.set_input_tensor([received_LBD])
        logits_BLV = model(tokens_BL)
        loss_of(logits_BLV).backward()
        distributed.send(received_LBD.grad, distributed.get_global_rank(group, 0), group=group)
        found = {"logits": logits_BLV.detach().numpy()}
    gradients = {
        name: Shard(_picklable(parameter.declaration), substrate.tensor_rank, parameter.grad.numpy())
        for name, parameter in model.named_global_parameters()
    }
    found["greedy"] = greedy(model.eval(), run.model.vocab_size, stages)
    return RankReport(gradients, [], [], []), found


def greedy(model: HybridModel, vocab_size: int, stages: Stages | None = None) -> list[int]:
    prompt = TOKENS_BL[0, :20].tolist()
    engine = Engine(model, max_batch_size=1, max_length=len(prompt) + NUM_NEW_TOKENS, vocab_size=vocab_size, stages=stages)
    tokens = engine.prefill(0, [Start(prompt, Sampling(temperature=0.0), seed=0)])
    return tokens + [engine.step().fetch()[0] for _ in range(NUM_NEW_TOKENS - 1)]


def loss_of(logits_BLV: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), TOKENS_BL[:, 1:].flatten())
