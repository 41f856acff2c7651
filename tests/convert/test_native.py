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
from megatron_hybrid.convert.native import NativeSource
from megatron_hybrid.generate.load import load_language_model, load_run
from megatron_hybrid.substrate.groups import initialize
from megatron_hybrid.tasks.pretrain import Pretraining
from tests.convert.checkpoints import edit_json
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


def test_tokenizer_and_configuration_go_with_it(hub: Path, native: Path, tmp_path: Path) -> None:
    assert {file.name for file in (native / "tokenizer").iterdir()} == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert main(["--from", "native", "--to", "hf", str(native), str(tmp_path / "back"), "--verdict", "bits", "--hf-style", "hub"]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hub / name).read_bytes()
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["eos_token_id"], config["max_position_embeddings"], config["hybrid_override_pattern"]) == (3, 64, "M-M*M-")


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
