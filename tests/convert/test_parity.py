"""A converted model is the same function as transformers' NemotronHForCausalLM: logits, gradients and greedy tokens, over many shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import NemotronHForCausalLM

from megatron_hybrid.config import RunConfig
from megatron_hybrid.convert.correspondence import correspondences
from megatron_hybrid.convert.hub import HubSource
from megatron_hybrid.convert.rearrange import to_native
from megatron_hybrid.convert.source import read_as
from megatron_hybrid.generate.engine import Engine, Start
from megatron_hybrid.generate.sampling import Sampling
from megatron_hybrid.model.build import build_chunks
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.substrate.groups import initialize
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from tests.convert.checkpoints import BASE, SHAPES, random_hub_model
from tests.runs import small_run

TOKENS_BL = torch.randint(BASE["vocab_size"], (2, 41), generator=torch.Generator().manual_seed(1))
"""More than two chunks of 16."""
NUM_NEW_TOKENS = 24
Found = dict[str, Any]


def our_side(path: Path, run: RunConfig) -> Found:
    """Logits, gradients by parameter and greedy tokens of the model in a Hugging Face directory; runs on a rank."""
    source = HubSource(path)
    run = run.model_copy(update={"model": source.model})
    substrate = initialize(run)
    (model,) = build_chunks(run, build_transformer_config(run, substrate), substrate)
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


def greedy(model: HybridModel, vocab_size: int) -> list[int]:
    prompt = TOKENS_BL[0, :20].tolist()
    engine = Engine(model, max_batch_size=1, max_length=len(prompt) + NUM_NEW_TOKENS, vocab_size=vocab_size)
    tokens = engine.prefill(0, [Start(prompt, Sampling(temperature=0.0), seed=0)])
    return tokens + [engine.step().fetch()[0] for _ in range(NUM_NEW_TOKENS - 1)]


def loss_of(logits_BLV: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), TOKENS_BL[:, 1:].flatten())


def their_side(model: NemotronHForCausalLM) -> Found:
    """The same of transformers' model, gradients by its own names."""
    logits_BLV = model(input_ids=TOKENS_BL[:, :-1], use_cache=False).logits
    loss_of(logits_BLV).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    settings = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    generated = model.generate(TOKENS_BL[:1, :20], attention_mask=torch.ones(1, 20, dtype=torch.long), **settings)
    return {"logits": logits_BLV.detach().numpy(), "gradients": gradients, "greedy": generated[0, 20:].tolist()}


def assert_near(here: np.ndarray, there: np.ndarray, name: str, relative: float) -> None:
    np.testing.assert_allclose(here, there, rtol=0, atol=relative * max(1e-30, np.abs(there).max()), err_msg=name)


@pytest.mark.parametrize("changes", [{}, *SHAPES.values()], ids=["plain", *SHAPES])
def test_ours_is_transformers_model(changes: dict[str, Any], tmp_path: Path, run_ranks) -> None:
    theirs_model = random_hub_model(**changes)
    theirs_model.save_pretrained(tmp_path / "hub")
    theirs = their_side(theirs_model)
    (ours,) = run_ranks(our_side, 1, tmp_path / "hub", small_run(tmp_path))
    assert np.abs(theirs["logits"]).max() > 1, "the comparison must have something to compare"
    assert_near(ours["logits"], theirs["logits"], "logits", 1e-5)
    model = HubSource(tmp_path / "hub").model
    for each in correspondences(model):
        expected = torch.cat(to_native(each, [theirs["gradients"][tensor.name] for tensor in each.hub], model))
        name = each.parameter
        assert expected.abs().max() > 0
        assert_near(ours["gradients"][name], expected.numpy(), name, 1e-4)
    assert ours["greedy"] == theirs["greedy"] and len(set(ours["greedy"])) > 3


def test_transformers_carries_the_state_from_chunk_to_chunk() -> None:
    """Its torch path once did not: one chunk of 64 and three of 16 have to be the same function."""
    logits = [random_hub_model(chunk_size=size)(input_ids=TOKENS_BL, use_cache=False).logits.detach().numpy() for size in (16, 64)]
    assert_near(*logits, "chunks of 16 and of 64", 1e-5)


def test_transformers_clamps_the_time_steps_of_sequences_alone() -> None:
    """Why we export a time_step_min that clamps nothing: otherwise its own decoding is another function than its forward pass."""

    def gap(**changes: Any) -> float:
        model = random_hub_model(**changes)
        tokens_BL = TOKENS_BL[:, :12]
        with torch.no_grad():
            forward_BV = model(input_ids=tokens_BL, use_cache=False).logits[:, -1]
            cache = None
            for token_BL in tokens_BL.split(1, dim=1):
                output = model(input_ids=token_BL, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
        return (output.logits[:, -1] - forward_BV).abs().max().item()

    assert gap() < 1e-5
    assert gap(time_step_min=0.05) > 1e-2
