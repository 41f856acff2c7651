"""Every wrong turn that a conversion can take is refused or caught, by the name of the tensor."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hybrid.convert import correspondence
from megatron_hybrid.convert.hub import HubSource
from megatron_hybrid.convert.job import plan_conversion
from megatron_hybrid.convert.logits import Bounds, LogitsReport, compare_logits
from megatron_hybrid.convert.native import NativeSource
from megatron_hybrid.convert.source import Source
from megatron_hybrid.convert.target import Layout
from megatron_hybrid.convert.verdict import compare_round_trip
from tests.convert.checkpoints import edit_json, save_hub
from tools.convert_checkpoint import main

INNER, GROUP_STATES, HEADS = 64, 32, 8
IN_PROJ = "model.layers.0.mixer.in_proj.weight"
CONV = "model.layers.0.mixer.conv1d.weight"
Weights = dict[str, torch.Tensor]


def naive_row_slices(weights: Weights) -> None:
    """in_proj cut for two ranks as if it were one plain matrix, and joined by component."""
    sizes = [size // 2 for size in (INNER, INNER, GROUP_STATES, GROUP_STATES, HEADS)]
    ranks = [half.split(sizes) for half in weights[IN_PROJ].chunk(2)]
    weights[IN_PROJ] = torch.cat([torch.cat(parts) for parts in zip(*ranks, strict=True)])


def swapped_b_and_c(weights: Weights) -> None:
    zx, b, c, dt = weights[IN_PROJ].split([2 * INNER, GROUP_STATES, GROUP_STATES, HEADS])
    weights[IN_PROJ] = torch.cat([zx, c, b, dt])


def reversed_taps(weights: Weights) -> None:
    """The other convention of a convolution."""
    weights[CONV] = weights[CONV].flip(-1)


def swapped_heads(weights: Weights) -> None:
    name = "model.layers.3.mixer.q_proj.weight"
    weights[name] = weights[name].view(4, 8, -1).flip(0).reshape(32, -1)


def one_bit(weights: Weights) -> None:
    weights["model.norm_f.weight"].view(torch.int32)[7] ^= 1


WRONG_VALUES: dict[str, tuple[Callable[[Weights], None], list[str]]] = {
    "naive row slices of in_proj": (
        naive_row_slices,
        [f"decoder.layers.0.mixer.in_proj.weight.{part}" for part in ("z", "x", "B", "C", "dt")],
    ),
    "B and C swapped": (swapped_b_and_c, [f"decoder.layers.0.mixer.in_proj.weight.{part}" for part in ("B", "C")]),
    "taps reversed": (reversed_taps, [f"decoder.layers.0.mixer.conv1d.weight.{part}" for part in ("x", "B", "C")]),
    "queries in another order": (swapped_heads, ["decoder.layers.3.self_attention.linear_qkv.weight"]),
    "one bit": (one_bit, ["decoder.final_norm.weight"]),
}


@pytest.fixture(scope="module")
def converted(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "model"
    assert main(["--from", "native", "--to", "hf", str(native), str(path), "--verdict", "bits"]) == 0
    return path


@pytest.fixture
def target(converted: Path, tmp_path: Path) -> Iterator[Path]:
    """A converted directory to be spoilt."""
    yield Path(shutil.copytree(converted, tmp_path / "target"))


def spoil(target: Path, change: Callable[[Weights], object]) -> None:
    file = target / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file, metadata={"format": "pt"})


def differing(native: Path, target: Path) -> list[str]:
    source = NativeSource(native)
    result = compare_round_trip(source, HubSource(target), plan_conversion(source, Layout()))
    return list(result.differing)


def logits(ours: Source, hub: Source) -> LogitsReport:
    return compare_logits(ours, hub, plan_conversion(ours, Layout()).dtypes, Bounds())


@pytest.mark.parametrize(("change", "names"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_wrong_values_are_named(change: Callable[[Weights], None], names: list[str], native: Path, target: Path) -> None:
    assert differing(native, target) == []
    spoil(target, change)
    assert differing(native, target) == [f"{name}: other values" for name in names]


def test_logits_find_the_layer_too(native: Path, target: Path) -> None:
    assert logits(NativeSource(native), HubSource(target)).failures(Bounds()) == []
    spoil(target, swapped_heads)
    report = logits(NativeSource(native), HubSource(target))
    assert report.first_wrong == "layer 3 (attention: decoder.layers.3, model.layers.3)"
    assert len(report.failures(Bounds())) >= 3


def test_a_map_that_is_wrong_both_ways_is_found_by_the_logits(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one mistake that a round trip cannot see: what goes in wrong comes out right again."""
    right = correspondence._rows

    def wrong(layer: int, key: str, name: str, parts: tuple[tuple[str, int], ...], shape: tuple[int, ...]) -> correspondence.Correspondence:
        order = {"B": "C", "C": "B"}
        return right(layer, key, name, tuple((order.get(part, part), rows) for part, rows in parts), shape)

    monkeypatch.setattr(correspondence, "_rows", wrong)
    command = ["--from", "hf", "--to", "native", str(hub), str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        # Our layers have their components in the right order, whatever the table says.
        patch.setattr("megatron_hybrid.convert.logits._Table.our_parameter", joined_by_name)
        assert main(command) == 1
    said = capsys.readouterr()
    assert (
        "come back bit for bit" in said.out and "the residual streams part at layer 0 (mamba" in said.out and "verdict: FAILED" in said.out
    )
    assert "run.rejected is not what" in said.err
    assert (tmp_path / "run.rejected").is_dir() and not (tmp_path / "run").exists()


def joined_by_name(table: Any, name: str) -> torch.Tensor:
    source = table._source
    parts = [f"{name}.{part}" for part in ("z", "x", "B", "C", "dt")]
    keys = [key for key in parts if key in source.specs] or [name]
    return torch.cat([source.read(key).float() for key in keys])


def test_rounding_alone_does_not_fail_the_logits(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--from", "hf", "--to", "native", str(hub), str(tmp_path / "run"), "--dtype", "bfloat16"]) == 0
    found = NativeSource(tmp_path / "run").specs
    fp32 = {key for key, spec in found.items() if spec.dtype == torch.float32}
    assert fp32 == {key for key in found if key.endswith(("A_log", "mixer.D", "dt_bias"))}
    assert "verdict: passed" in capsys.readouterr().out


def tampered(change: Callable[[Weights], object]) -> Callable[[Path], None]:
    return lambda path: spoil(path, change)


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (tampered(lambda weights: weights.pop(CONV)), f"missing {CONV}"),
    "extra tensor": (
        tampered(lambda weights: weights.setdefault("model.layers.0.mixer.in_proj.bias", torch.zeros(8))),
        "not part of the model: model.layers.0.mixer.in_proj.bias",
    ),
    "transposed convolution": (
        tampered(lambda weights: weights.update({CONV: weights[CONV].transpose(0, 2)})),
        r"conv1d.weight is \[4, 1, 128\], the configuration asks for \[128, 1, 4\]",
    ),
    "two names for one tensor": (
        tampered(lambda weights: weights.update({"backbone.norm_f.weight": weights["model.norm_f.weight"].clone()})),
        "has model.norm_f.weight twice",
    ),
    "quantised": (
        tampered(lambda weights: weights.update({CONV: weights[CONV].to(torch.int8)})),
        f"{CONV} is torch.int8; expected float32",
    ),
    "truncated file": (truncate, "is truncated: .* would lie beyond"),
    "another number of groups": (
        lambda path: edit_json(path / "config.json", n_groups=4),
        r"in_proj.weight is \[200, 32\], the configuration asks for \[264, 32\]",
    ),
    "another vocabulary": (
        lambda path: edit_json(path / "config.json", vocab_size=300),
        r"model.embeddings.weight is \[250, 32\], the configuration asks for \[300, 32\]",
    ),
    "a stage mark in the pattern": (
        lambda path: edit_json(path / "config.json", layers_block_type=None, hybrid_override_pattern="M-M|*M-"),
        r"hybrid_override_pattern has '\|' at position 4",
    ),
    "another pattern": (
        lambda path: edit_json(path / "config.json", layers_block_type=None, hybrid_override_pattern="M-MM*-"),
        "missing model.layers.3.mixer.A_log",
    ),
    "no configuration": (lambda path: (path / "config.json").unlink(), "config.json cannot be read"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "neither model.safetensors nor"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_whole_is_refused(change: Callable[[Path], Any], message: str, target: Path) -> None:
    change(target)
    with pytest.raises(ValueError, match=message):
        HubSource(target)


@pytest.mark.parametrize("case", ["missing tensor", "another vocabulary", "a stage mark in the pattern", "truncated file"])
def test_the_command_refuses_in_one_line(case: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = REFUSED[case]
    change(target)
    assert main(["--from", "hf", "--to", "native", str(target), str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and re.search(message, line)
    assert not list(tmp_path.glob("run*"))


@pytest.mark.parametrize(
    ("index", "message"),
    [("{}", "has no weight_map"), ("[]", "is no JSON object"), ('{"weight_map": ["a"]}', "has no weight_map"), ("{", "is no JSON")],
)
def test_an_index_that_is_none_is_named(index: str, message: str, target: Path) -> None:
    (target / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=f"model.safetensors.index.json {message}"):
        HubSource(target)


def test_groups_of_the_same_total_size_are_told_apart(native: Path, target: Path) -> None:
    """2 x 16 and 4 x 8 give tensors of the same shapes."""
    edit_json(target / "config.json", n_groups=4, ssm_state_size=8)
    assert differing(native, target) == [
        "configuration: mamba_num_groups is 4, in the source 2",
        "configuration: mamba_state_dim is 8, in the source 16",
    ]
    assert logits(NativeSource(native), HubSource(target)).first_wrong == "layer 0 (mamba: decoder.layers.0, model.layers.0)"


def test_shards_that_the_index_promises_must_be_there(tmp_path: Path) -> None:
    path = save_hub(tmp_path / "one")
    assert (
        main(
            [
                "--from",
                "hf",
                "--to",
                "hf",
                str(path),
                str(tmp_path / "many"),
                "--verdict",
                "bits",
                "--shard-gb",
                "0.00005",
                "--hf-style",
                "hub",
            ]
        )
        == 0
    )
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3 and HubSource(tmp_path / "many").specs == HubSource(path).specs
    shards[1].rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is missing; model.safetensors.index.json says it has backbone"):
        HubSource(tmp_path / "many")
    shutil.copyfile(shards[0], shards[1])
    with pytest.raises(ValueError, match="does not have backbone.*, though model.safetensors.index.json says so"):
        HubSource(tmp_path / "many")
