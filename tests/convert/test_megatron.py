"""Megatron-LM's directories: what Megatron-LM looks for is there, and its arguments tell the model."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import load_common_state_dict

from megatron_hybrid.convert.hub import HubSource
from megatron_hybrid.convert.megatron import MegatronSource, model_from_arguments, with_padding
from tests.convert.checkpoints import edit_json
from tools.convert_checkpoint import main


@pytest.fixture(scope="module")
def megatron(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("megatron") / "checkpoints"
    assert main(["--from", "native", "--to", "megatron", str(native), str(path), "--tensor", "2"]) == 0
    return path


def common_of(folder: Path) -> dict[str, Any]:
    """The common state as Megatron-LM reads it: through megatron-core, with its arguments' type allowed."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return load_common_state_dict(str(folder))


def change_arguments(copy: Path, **changes: Any) -> None:
    file = copy / "iter_0000001/common.pt"
    common = torch.load(file, weights_only=False)
    for name, value in changes.items():
        setattr(common["args"], name, value)
    torch.save(common, file)


def test_everything_megatron_lm_looks_for_is_there(megatron: Path, hub: Path) -> None:
    assert (megatron / "latest_checkpointed_iteration.txt").read_text() == "1"
    folder = megatron / "iter_0000001"
    assert {path.name for path in folder.iterdir()} == {"__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json", "common.pt"}
    common = common_of(folder)
    assert (common["iteration"], common["checkpoint_version"]) == (1, 3.0)
    arguments = common["args"]
    assert isinstance(arguments, argparse.Namespace)
    expected = {
        "hybrid_override_pattern": "M-M*M-", "num_layers": 6, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
        "num_query_groups": 2, "kv_channels": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "mamba_num_groups": 2, "mamba_state_dim": 16,
        "padded_vocab_size": 256, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "position_embedding_type": "none",
        "bf16": False,
    }  # fmt: skip
    assert {name: getattr(arguments, name) for name in expected} == expected
    assert MegatronSource(megatron).model.model_dump() == HubSource(hub).model.model_dump()


def test_back_to_hugging_face_bit_for_bit(megatron: Path, hub: Path, tmp_path: Path) -> None:
    assert main(["--from", "megatron", "--to", "hf", str(megatron / "iter_0000001"), str(tmp_path / "back"), "--verdict", "bits"]) == 0
    before, after = HubSource(hub), HubSource(tmp_path / "back")
    assert before.specs.keys() == after.specs.keys()
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.specs)
    assert (tmp_path / "back/tokenizer.json").is_file()


def test_stage_marks_in_the_arguments_are_no_layers(megatron: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(megatron, tmp_path / "copy"))
    change_arguments(copy, hybrid_override_pattern="M-M|*M-")
    assert MegatronSource(copy).model.layer_kinds == "M-M*M-"
    change_arguments(copy, hybrid_override_pattern="M-M*M-/M*")
    with pytest.raises(ValueError, match="multi-token prediction"):
        MegatronSource(copy)


def test_a_checkpoint_without_arguments_needs_a_configuration(
    megatron: Path, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(megatron, tmp_path / "copy"))
    (copy / "iter_0000001/common.pt").unlink()
    command = ["--from", "megatron", "--to", "hf", str(copy), str(tmp_path / "hub"), "--verdict", "bits"]
    assert main(command) == 2
    assert "say with --config what the checkpoint is of" in capsys.readouterr().err
    assert main([*command, "--config", str(hub / "config.json")]) == 0


def test_a_common_state_that_could_run_code_is_not_read(megatron: Path, hub: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(megatron, tmp_path / "copy"))
    change_arguments(copy, something=shutil.rmtree)
    with pytest.raises(ValueError, match="could run code"):
        MegatronSource(copy)
    assert MegatronSource(copy, model=HubSource(hub).model).model.layer_kinds == "M-M*M-"


@pytest.mark.parametrize("end", [0, 60, -100])
def test_a_damaged_common_state_is_not_taken_for_a_dangerous_one(end: int, megatron: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(megatron, tmp_path / "copy"))
    file = copy / "iter_0000001/common.pt"
    for damaged in (file.read_bytes()[:end], bytes(range(256)), b"hello"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"common.pt is damaged \(\w+\); copy it again"):
            MegatronSource(copy)
    torch.save(["no dictionary"], file)
    with pytest.raises(ValueError, match="common.pt is not what Megatron-LM writes"):
        MegatronSource(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "rope"}, "trained with position_embedding_type='rope'"),
        ({"swiglu": True}, "swiglu=True"),
        ({"mamba_num_groups": 4}, r"layers\.0\.mixer\.in_proj\.weight\.B is \[32, 32\], the configuration asks for \[64, 32\]"),
        ({"hybrid_override_pattern": "M-MM*M-"}, r"missing decoder\.layers"),
        ({"hidden_size": None}, "do not have hidden_size"),
        ({"vocab_size": None}, "say with --vocab-size"),
        ({"vocab_size": 1000}, "256 rows, but 1,000 tokens: it is of another vocabulary"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, megatron: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(megatron, tmp_path / "copy"))
    change_arguments(copy, **changes)
    with pytest.raises(ValueError, match=message):
        MegatronSource(copy)


def test_arguments_and_given_configuration_must_agree(megatron: Path, hub: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(hub, tmp_path / "hub"))
    edit_json(copy / "config.json", n_groups=4, ssm_state_size=8)
    with pytest.raises(ValueError, match="mamba_num_groups is 2 there and 4 in --config"):
        MegatronSource(megatron, model=HubSource(copy).model)


def test_unset_arguments_have_megatrons_meaning(megatron: Path) -> None:
    arguments = vars(common_of(megatron / "iter_0000001")["args"])
    model = model_from_arguments(
        {**arguments, "mamba_num_heads": None, "group_query_attention": False}, padded_vocab_size=256, vocab_size=250
    )
    assert (model.mamba_num_heads, model.num_kv_heads) == (2 * 32 // 8, 4)


@pytest.mark.parametrize("rows", [250, 252, 256, 384, 512, 1024])
def test_any_padding_is_understood(rows: int, hub: Path) -> None:
    assert with_padding(HubSource(hub).model, rows).padded_vocab_size == rows
