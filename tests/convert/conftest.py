"""Checkpoints that many tests read, made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.convert.checkpoints import BASE, save_hub
from tools.convert_checkpoint import main


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are too small to share among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face checkpoint with all that may lie beside it: a tokenizer that puts w1 before a text, a chat template, two end tokens.
    Not to be changed."""
    path = save_hub(tmp_path_factory.mktemp("hub") / "model", bos_token_id=1, eos_token_id=[3, 11], pad_token_id=0)
    words = {f"w{number}": number for number in range(BASE["vocab_size"])}
    words["</s>"] = words.pop("w3")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}')
    return path


@pytest.fixture(scope="session")
def native(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a run directory of ours, cut for 2 x 2 ranks; not to be changed."""
    path = tmp_path_factory.mktemp("native") / "run"
    assert main(["--from", "hf", "--to", "native", str(hub), str(path), "--tensor", "2", "--pipeline", "2", "--verdict", "bits"]) == 0
    return path
