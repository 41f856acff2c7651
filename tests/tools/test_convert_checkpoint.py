"""The command: every pair of kinds ends in a verdict, mistakes are one line, and transformers loads what is written."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_hybrid.convert.hub import HubSource
from megatron_hybrid.convert.hub_config import hub_from_model
from megatron_hybrid.convert.job import plan_conversion
from megatron_hybrid.convert.megatron import MegatronSource, arguments_of
from megatron_hybrid.convert.native import NativeSource
from megatron_hybrid.convert.target import Layout
from tests.convert.checkpoints import random_hub_model, save_hub
from tools.convert_checkpoint import main
from tools.minipuzzle.candidate import Candidate
from tools.minipuzzle.prune import prune
from tools.minipuzzle.scores import synthetic_scores

KINDS = ("hf", "megatron", "native")
TOKENS = torch.tensor([[5, 17, 3, 200, 9]])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same small model in every kind."""
    folder = tmp_path_factory.mktemp("sources")
    save_hub(folder / "hf", hybrid_override_pattern="M-*-")
    for kind in ("megatron", "native"):
        assert main(["--from", "hf", "--to", kind, str(folder / "hf"), str(folder / kind), "--verdict", "bits"]) == 0
    return {kind: folder / kind for kind in KINDS}


@pytest.mark.parametrize(("here", "there"), list(product(KINDS, KINDS)))
def test_every_pair_ends_in_a_verdict(
    here: str, there: str, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--from", here, "--to", there, str(sources[here]), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "come back bit for bit" in said and "verdict: passed" in said
    assert ("logits of 160 tokens, ours and transformers 5.23.0 in fp32: largest error" in said) == ("hf" in (here, there))
    assert main(["--from", there, "--to", here, str(tmp_path / "out"), str(sources[here]), "--verify-only", "--verdict", "bits"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("style", ["transformers", "hub"])
def test_transformers_loads_what_is_written(style: str, sources: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert (
        main(
            [
                "--from",
                "native",
                "--to",
                "hf",
                str(sources["native"]),
                str(target),
                "--hf-style",
                style,
                "--shard-gb",
                "0.00005",
                "--verdict",
                "bits",
            ]
        )
        == 0
    )
    config = json.loads((target / "config.json").read_text())
    prefix = {"transformers": "model.", "hub": "backbone."}[style]
    weight_map = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(name == "lm_head.weight" or name.startswith(prefix) for name in weight_map)
    assert ("layers_block_type" in config, "hybrid_override_pattern" in config) == (style == "transformers", style == "hub")
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, random_hub_model(hybrid_override_pattern="M-*-")(TOKENS).logits)


def test_dtypes_are_kept_or_chosen(sources: dict[str, Path], tmp_path: Path) -> None:
    save_hub(tmp_path / "hub", dtype=torch.bfloat16, hybrid_override_pattern="M-*-")
    for there, option, expected in (("kept", "keep", torch.bfloat16), ("widened", "float32", torch.float32)):
        assert (
            main(["--from", "hf", "--to", "hf", str(tmp_path / "hub"), str(tmp_path / there), "--dtype", option, "--verdict", "bits"]) == 0
        )
        specs = HubSource(tmp_path / there).specs
        assert {spec.dtype for name, spec in specs.items() if not name.endswith(("A_log", "mixer.D", "dt_bias"))} == {expected}
        assert {spec.dtype for name, spec in specs.items() if name.endswith(("A_log", "mixer.D", "dt_bias"))} == {torch.float32}


def test_vocabulary_padding_is_chosen(sources: dict[str, Path], tmp_path: Path) -> None:
    assert main(["--from", "native", "--to", "megatron", str(sources["native"]), str(tmp_path / "out"), "--vocab-divisible-by", "512"]) == 0
    assert main(["--from", "megatron", "--to", "hf", str(tmp_path / "out"), str(tmp_path / "hub"), "--verdict", "bits"]) == 0
    padded, hub = MegatronSource(tmp_path / "out"), HubSource(tmp_path / "hub")
    assert (padded.specs["output_layer.weight"].shape[0], hub.specs["lm_head.weight"].shape[0]) == (512, 250)
    assert padded.read("output_layer.weight")[250:].eq(0).all()


def test_a_verdict_against_a_target_is_exit_code_1(sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = Path(shutil.copytree(sources["hf"], tmp_path / "target"))
    save_hub(target, seed=1, hybrid_override_pattern="M-*-")
    command = ["--from", "native", "--to", "hf", str(sources["native"]), str(target), "--verify-only"]
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "embedding.word_embeddings.weight: other values" in said and "bound" in said and "verdict: FAILED" in said
    (target / "model.safetensors").write_bytes((target / "model.safetensors").read_bytes()[:-1])
    assert main(command) == 1
    assert "verdict: FAILED" in (said := capsys.readouterr().out) and "is truncated" in said


def test_another_vocabulary_is_a_failed_verdict(sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_hub(tmp_path / "other", hybrid_override_pattern="M-*-", vocab_size=240)
    assert main(["--from", "native", "--to", "hf", str(sources["native"]), str(other), "--verify-only"]) == 1
    said = capsys.readouterr()
    assert "round trip: 1 difference\n  configuration: vocab_size is 240, in the source 250\n" in said.out
    assert said.out.endswith("verdict: FAILED\n") and "error" not in said.err


def test_a_lost_file_is_a_failed_verdict(sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = (Path(shutil.copytree(sources["hf"], tmp_path / name)) for name in ("source", "target"))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    assert main(["--from", "hf", "--to", "hf", str(source), str(target), "--verify-only", "--verdict", "bits"]) == 1
    said = capsys.readouterr().out
    assert "chat_template.jinja: not there, though the source has it" in said and "verdict: FAILED" in said


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted: whatever is written is kept, and the same command continues\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: [Errno 28] No space left on device; whatever is written is kept"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "error: [Errno 13] Permission denied: 'out'\n"),
    ],
    ids=["Ctrl-C", "full disk", "closed path"],
)
def test_what_stops_a_conversion_is_one_line(
    error: BaseException,
    code: int,
    said: str,
    sources: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("megatron_hybrid.convert.job.run_conversion", stop)
    assert main(["--from", "hf", "--to", "native", str(sources["hf"]), str(tmp_path / "out")]) == code
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("missing", ["nothere.json", "nothere.yaml"])
def test_a_configuration_that_is_not_there_is_the_users_to_mend(
    missing: str, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--from", "megatron", "--to", "hf", str(sources["megatron"]), str(tmp_path / "out"), "--config", missing]
    assert main(command) == 2
    assert missing in (said := capsys.readouterr().err) and "kept" not in said


def test_imports_may_be_interrupted() -> None:
    """Ctrl-C while torch is being imported is one line too."""
    interrupt = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch': raise KeyboardInterrupt\n"
        "from tools.convert_checkpoint import main\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "sys.exit(main(['--from', 'hf', '--to', 'native', 'source', 'target']))\n"
    )
    result = subprocess.run([sys.executable, "-c", interrupt], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "interrupted: whatever is written is kept, and the same command continues\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "hf", "--tensor", "2"], "--tensor means something only with --to megatron or native"),
        (["--to", "native", "--hf-style", "hub"], "--hf-style means something only with --to hf"),
        (["--to", "native", "--vocab-size", "3"], "--vocab-size means something only with --from megatron"),
        (["--to", "hf", "--shard-gb", "-1"], "--shard-gb must be above 0"),
        (["--to", "native", "--tensor", "3"], "does not divide by parallel.tensor=3"),
        (["--to", "native", "--pipeline", "9"], "asks for 9 stages"),
        (["--to", "native", "--tokenizer", "nowhere"], "tokenizer nowhere does not exist"),
        (["--to", "native", "--verify-only"], "out does not exist, so there is nothing to verify"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], message: str, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--from", "hf", str(sources["hf"]), str(tmp_path / "out"), *options]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.iterdir())


def test_sources_of_another_kind_are_refused(sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, message in (
        ("hf", "is no Hugging Face model"),
        ("native", "is neither a checkpoint"),
        ("megatron", "is neither a torch_dist checkpoint"),
    ):
        assert main(["--from", kind, "--to", "hf", str(tmp_path), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_help_shows_an_example() -> None:
    result = subprocess.run([sys.executable, "-m", "tools.convert_checkpoint", "--help"], capture_output=True, text=True, check=True)
    assert (
        "python -m tools.convert_checkpoint --from native --to hf" in result.stdout and "exit code: 0 converted and proven" in result.stdout
    )


@pytest.mark.parametrize("there", ["hf", "megatron"])
def test_layers_of_different_widths_are_filled_up_for_formats_with_one(
    there: str, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = NativeSource(sources["native"])
    model = parent.model
    candidate = Candidate(tuple(range(4)), (40, 48), model.mamba_num_heads, model.mamba_head_dim, model.hidden_size)
    mixed = prune(parent, candidate, synthetic_scores(model, 0), tmp_path / "mixed")
    assert main(["--from", "native", "--to", there, str(mixed), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"MLP layers are 40 to 48 wide; {there} has one width, so zeros fill all of them up to 48" in said
    assert "come back bit for bit" in said and "verdict: passed" in said
    assert ("logits of 160 tokens" in said) == (there == "hf")
    assert main(["--from", there, "--to", "native", str(tmp_path / "out"), str(tmp_path / "back"), "--verdict", "bits"]) == 0
    back, before = NativeSource(tmp_path / "back"), NativeSource(mixed)
    fc1 = back.read("decoder.layers.1.mlp.linear_fc1.weight")
    assert back.model.ffn_hidden_size == 48 and torch.equal(fc1[:40], before.read("decoder.layers.1.mlp.linear_fc1.weight"))
    plan = plan_conversion(before, Layout())
    with pytest.raises(ValueError, match="has one width for all; fill them up with zeros first"):
        hub_from_model(plan.model, style="hub", dtype="float32", max_position_embeddings=64, token_ids={})
    with pytest.raises(ValueError, match="Megatron-LM has one width for all"):
        arguments_of(plan, 1)
