"""Hugging Face directories: transformers' own tokens from its own files, on one rank and cut over several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_hybrid.config import RunConfig
from megatron_hybrid.generate.load import load_run
from tests.convert.checkpoints import random_hub_model
from tests.generate.models import continue_in_shards, random_prompts, word_tokenizer

NUM_NEW = 10


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A NemotronH that transformers saved in several files, with a tokenizer that puts a token in front, and two end tokens."""
    path = tmp_path_factory.mktemp("hub") / "model"
    random_hub_model().save_pretrained(path, max_shard_size="100KB")
    tokenizer = word_tokenizer().to_str()
    definition = json.loads(tokenizer)
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "t2", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"t2": {"id": "t2", "ids": [2], "tokens": ["t2"]}},
    }
    (path / "tokenizer.json").write_text(json.dumps(definition))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "t3", "bos_token": {"content": "t2"}, "chat_template": "{{ bos_token }}"})
    )
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7]}))
    return path


def run_for(path: Path, **layout: int) -> RunConfig:
    run = load_run(path, **layout)
    return run.model_copy(update={"runtime": run.runtime.model_copy(update={"threads_per_rank": 1, "device": "cpu"})})


def test_a_directory_of_transformers_gives_its_tokens(hub: Path, run_ranks) -> None:
    prompts = random_prompts(70, 9, 1)
    model, expected = random_hub_model(), []
    for prompt in prompts:
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(NUM_NEW):
                tokens.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax().item())
        expected.append(tokens[len(prompt) :])
    for layout in ({}, {"tensor": 2}, {"tensor": 2, "pipeline": 2}):
        run = run_for(hub, **layout)
        for report in run_ranks(continue_in_shards, run.parallel.model_ranks, run, hub, prompts, NUM_NEW):
            assert report["tokens"] == expected and report["precision"] == "fp32"
    companions = report["companions"]
    assert companions.prompt_prefix == (2,) and companions.end_tokens == {3, 7}
    assert companions.chat_template == "{{ bos_token }}" and companions.special_tokens["bos_token"] == "t2"


def test_what_is_no_model_is_named(tmp_path: Path, hub: Path) -> None:
    with pytest.raises(ValueError, match="no run directory: it has no config.yaml; nor a Hugging Face one: it has no config.json"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="parallel.tensor"):
        load_run(hub, tensor=3)
