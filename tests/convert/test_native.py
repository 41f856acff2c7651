"""A converted run directory is one of ours: generation reads it, training starts from it, and resuming it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import NemotronHForCausalLM

from megatron_hybrid.checkpoint import check_header, read_header
from megatron_hybrid.config import dump_config
from megatron_hybrid.config.run_directory import kept_tokenizer
from megatron_hybrid.convert.native import NativeSource
from megatron_hybrid.generate.companions import Companions
from megatron_hybrid.generate.engine import Engine, Start
from megatron_hybrid.generate.load import load_language_model, load_run
from megatron_hybrid.generate.sampling import Sampling
from megatron_hybrid.generate.text import encode_prompt
from megatron_hybrid.substrate.groups import initialize
from megatron_hybrid.tasks.pretrain import Pretraining
from tests.convert.checkpoints import BASE, edit_json
from tools.convert_checkpoint import main

TOKENS = [[5, 17, 3, 200, 9]]


def logits_of_run(path: Path) -> tuple[np.ndarray, int]:
    """What the program's own way of loading a run makes of it, and the end token of its tokenizer; runs on a rank."""
    run = load_run(path)
    loaded = load_language_model(run, path, initialize(run))
    with torch.no_grad():
        return loaded.model(torch.tensor(TOKENS)).numpy(), loaded.tokenizer.eod_id


def test_generation_reads_it(hub: Path, native: Path, run_ranks) -> None:
    ((logits, eod_id),) = run_ranks(logits_of_run, 1, native)
    theirs = NemotronHForCausalLM.from_pretrained(hub, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert eod_id == 3


def test_training_starts_from_it_and_does_not_resume_it(native: Path) -> None:
    run = load_run(native)
    header = read_header(NativeSource(native).path)
    architecture = Pretraining.architecture(SimpleNamespace(run=run))
    check_header(header, model=architecture)
    with pytest.raises(ValueError, match="start a new run from the weights"):
        check_header(header, model=architecture, training={"precision": "fp32", "distributed_optimizer": True})


BESIDE = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "special_tokens_map.json"}


@pytest.mark.parametrize("by_way_of", [["native"], ["native", "megatron"], ["hf"]], ids="+".join)
def test_tokenizer_and_configuration_go_there_and_back(by_way_of: list[str], hub: Path, native: Path, tmp_path: Path) -> None:
    here, kind = (native, "native") if by_way_of[0] == "native" else (hub, "hf")
    for number, there in enumerate([*by_way_of[1:], "hf"]):
        out = tmp_path / f"{number}"
        assert main(["--from", kind, "--to", there, str(here), str(out), "--verdict", "bits"]) == 0
        here, kind = out, there
    assert {file.name for file in here.iterdir()} == BESIDE | {"config.json", "model.safetensors"}
    for name in BESIDE:
        assert (here / name).read_bytes() == (hub / name).read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (hub, here))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"):
        assert after[name] == before[name] is not None


def test_a_converted_run_may_move(native: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(native, tmp_path / "moved"))
    assert kept_tokenizer(load_run(moved), moved).path == moved / "tokenizer/tokenizer.json"
    assert NativeSource(moved).companions.tokenizer_files["chat_template.jinja"] == moved / "tokenizer/chat_template.jinja"


def test_the_tokenizer_that_training_kept_is_the_runs_and_files_beside_the_same_original_go_along(native: Path, tmp_path: Path) -> None:
    moved, original = Path(shutil.copytree(native, tmp_path / "moved")), tmp_path / "original"
    (moved / "tokenizer").rename(original)
    shutil.copy(original / "tokenizer.json", moved / "tokenizer.json")
    run = load_run(moved)
    tokenizer = run.data.tokenizer.model_copy(update={"path": original / "tokenizer.json"})
    (moved / "config.yaml").write_text(dump_config(run.model_copy(update={"data": run.data.model_copy(update={"tokenizer": tokenizer})})))
    assert NativeSource(moved).companions.tokenizer_files == {name: original / name for name in BESIDE}
    # Trained again.
    edit_json(original / "tokenizer.json", version="2")
    found = NativeSource(moved).companions
    assert found.tokenizer.path == moved / "tokenizer.json" and found.tokenizer_files == {"tokenizer.json": moved / "tokenizer.json"}


def spoken_to(path: Path) -> tuple[Companions, list[int]]:
    """What a directory says of how to speak with its model, and what that answers; runs on a rank."""
    run = load_run(path)
    loaded = load_language_model(run, path, initialize(run))
    prompt = encode_prompt("w5 w17", loaded.tokenizer, loaded.companions.prompt_prefix)
    engine = Engine(loaded.model, max_batch_size=1, max_length=32, vocab_size=BASE["vocab_size"])
    tokens = engine.prefill(0, [Start(prompt, Sampling(temperature=0.0), seed=0)])
    return loaded.companions, tokens + [engine.step().fetch()[0] for _ in range(8)]


def test_it_is_spoken_to_as_its_source(hub: Path, native: Path, tmp_path: Path, run_ranks) -> None:
    """The tokenizer's own beginning, all end tokens, the chat template, and so the same text; from run to run too."""
    assert main(["--from", "native", "--to", "native", str(native), str(tmp_path / "again"), "--verdict", "bits"]) == 0
    (theirs,), (ours,), (again,) = (run_ranks(spoken_to, 1, path) for path in (hub, native, tmp_path / "again"))
    assert theirs == ours == again
    companions = ours[0]
    assert companions.prompt_prefix == (1,) and companions.end_tokens == {3, 11} and companions.chat_template


def test_damage_is_named(native: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(NativeSource(native).path, tmp_path / "copy"))
    file = copy / "__3_0.distcp"
    data = bytearray(file.read_bytes())
    # The values of the last tensor that the file has.
    place = len(data) - 4000
    data[place] ^= 1
    file.write_bytes(data)
    source = NativeSource(copy)
    with pytest.raises(ValueError, match="output_layer.weight"):
        source.read("output_layer.weight")
    edit_json(copy / "manifest.json", crc32="00000000")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        NativeSource(copy)
    with pytest.raises(ValueError, match="is neither a checkpoint"):
        NativeSource(tmp_path)
