"""A converted model is the same function as transformers' NemotronHForCausalLM: logits, gradients and greedy tokens, over many shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import NemotronHForCausalLM

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.convert.correspondence import correspondences
from megatron_hybrid.convert.hub import HubSource
from megatron_hybrid.convert.native import NativeSource
from megatron_hybrid.convert.rearrange import to_native
from tests.convert.checkpoints import SHAPES, random_hub_model
from tests.convert.our_side import NUM_NEW_TOKENS, TOKENS_BL, Found, loss_of, our_side, our_side_in_shards
from tests.runs import small_run
from tests.train.layouts import assemble


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
    assert_same(ours, theirs, HubSource(tmp_path / "hub").model)


def test_shards_for_two_tensor_ranks_and_two_stages_are_transformers_model(hub: Path, native: Path, run_ranks) -> None:
    """``native`` was cut by ``--tensor 2 --pipeline 2``; four ranks load it and run it as what they are."""
    theirs, model = their_side(random_hub_model()), HubSource(hub).model
    assert len(list(NativeSource(native).path.glob("*.distcp"))) == 4
    run = small_run(native, model=model.model_dump(), parallel={"tensor": 2, "pipeline": 2})
    reports, found = zip(*run_ranks(our_side_in_shards, 4, native, run), strict=True)
    last = [each for each in found if "logits" in each]
    assert len(last) == 2 and all(each["greedy"] == last[0]["greedy"] for each in found)
    for each in last:
        assert_same({**each, "gradients": assemble(list(reports), 2)}, theirs, model)


def assert_same(ours: Found, theirs: Found, model: ModelConfig) -> None:
    assert np.abs(theirs["logits"]).max() > 1, "the comparison must have something to compare"
    assert_near(ours["logits"], theirs["logits"], "logits", 1e-5)
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
