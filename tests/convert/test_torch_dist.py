"""Directories of ours are megatron-core's, in any cut; and what ranks of any layout saved is read whole."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import make_dataclass
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from torch.distributed._shard.sharded_tensor import metadata as early_torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_hybrid.checkpoint import CheckpointStore
from megatron_hybrid.checkpoint.sharding import shard_parameters
from megatron_hybrid.config import RunConfig
from megatron_hybrid.convert.correspondence import correspondences
from megatron_hybrid.convert.native import NativeSource
from megatron_hybrid.convert.torch_dist import TorchDistReader
from megatron_hybrid.convert.torch_dist_metadata import read_metadata
from megatron_hybrid.layers.parameters import Declaration
from megatron_hybrid.model.build import build_chunks
from megatron_hybrid.substrate.groups import initialize
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from tests.runs import small_run
from tools.convert_checkpoint import main


def save_run(run: RunConfig) -> None:
    """Save the initial weights, as the trainer does; no layout changes what they are. Runs on every rank."""
    substrate = initialize(run)
    sharded: dict[str, Any] = {}
    for chunk in build_chunks(run, build_transformer_config(run, substrate), substrate):
        sharded |= shard_parameters(chunk.named_global_parameters(), substrate.tensor_group, substrate.data_group)
    header = {"state": {"step": 5, "samples": 40}, "model": run.model.architecture(), "data": {}, "training": {}}
    CheckpointStore(run.run_dir / "checkpoints", keep_last=None, asynchronous=False).save(5, {"model": sharded}, header)


def load_with_megatron_core(directory: Path, run: RunConfig) -> list[str]:
    """What differs from the initial weights when megatron-core's ``load`` reads a directory; runs on every rank of a layout."""
    substrate = initialize(run)
    found = []
    for chunk in build_chunks(run, build_transformer_config(run, substrate), substrate):
        sharded = shard_parameters(chunk.named_global_parameters(), substrate.tensor_group, substrate.data_group)
        loaded = dist_checkpointing.load({"model": sharded}, str(directory))["model"]
        found += [
            name for name, parameter in chunk.named_global_parameters() if not is_same(parameter, loaded[name], substrate.tensor_rank, run)
        ]
    return found


def is_same(parameter: torch.nn.Parameter, loaded: torch.Tensor, tensor_rank: int, run: RunConfig) -> bool:
    """Bit for bit, but for rows of the vocabulary that are padding."""
    declaration: Declaration = parameter.declaration
    if declaration.global_shape[0] != run.model.padded_vocab_size:
        return torch.equal(parameter, loaded)
    num_tokens = max(0, run.model.vocab_size - tensor_rank * len(parameter))
    return torch.equal(parameter[:num_tokens], loaded[:num_tokens])


LAYOUTS = {"tp2 pp2": {"tensor": 2, "pipeline": 2}, "pp2 interleaved": {"pipeline": 2, "virtual_pipeline": 2}}


@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
def test_shards_of_any_layout_become_the_same_hub_checkpoint(parallel: dict[str, int], tmp_path: Path, run_ranks) -> None:
    files = []
    for name, layout in (("one", {}), ("many", parallel)):
        run_ranks(
            save_run,
            layout.get("tensor", 1) * layout.get("pipeline", 1),
            small_run(tmp_path, run_dir=tmp_path / name, parallel=layout, train={"global_batch_size": 8}),
        )
        assert main(["--from", "native", "--to", "hf", str(tmp_path / name), str(tmp_path / f"{name}.hf"), "--verdict", "bits"]) == 0
        files.append((tmp_path / f"{name}.hf" / "model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("kind", ["megatron", "native"])
def test_megatron_core_loads_what_is_written_into_any_layout(kind: str, tmp_path: Path, run_ranks) -> None:
    run = small_run(tmp_path, run_dir=tmp_path / "run")
    run_ranks(save_run, 1, run)
    hub, target = tmp_path / "hub", tmp_path / "target"
    assert main(["--from", "native", "--to", "hf", str(run.run_dir), str(hub), "--verdict", "bits"]) == 0
    assert main(["--from", "hf", "--to", kind, str(hub), str(target), "--tensor", "4", "--pipeline", "2", "--verdict", "bits"]) == 0
    (directory,) = [path.parent for path in target.rglob(".metadata")]
    assert len(list(directory.glob("*.distcp"))) == 8
    assert dist_checkpointing.check_is_distributed_checkpoint(str(directory))
    for layout in ({}, {"tensor": 2}, {"pipeline": 2}):
        ranks = layout.get("tensor", 1) * layout.get("pipeline", 1)
        assert run_ranks(load_with_megatron_core, ranks, directory, small_run(tmp_path, parallel=layout)) == [[]] * ranks


def test_metadata_names_every_tensor(native: Path) -> None:
    source = NativeSource(native)
    found = dist_checkpointing.load_tensors_metadata(str(source.path))
    assert all(isinstance(tensor, ShardedTensor) for tensor in found.values())
    assert {key: tuple(tensor.global_shape) for key, tensor in found.items()} == {
        tensor.key: tensor.shape for each in correspondences(source.model) for tensor in each.native
    }


def test_truncated_files_are_refused_by_tensor(native: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(NativeSource(native).path, tmp_path / "copy"))
    file = copy / "__3_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"is truncated: .* too short for output_layer.weight"):
        TorchDistReader(copy)
    file.unlink()
    with pytest.raises(ValueError, match=r"is truncated: a file is missing or too short for decoder\.layers"):
        TorchDistReader(copy)


class RunsCode:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_metadata_cannot_run_code(native: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(NativeSource(native).path, tmp_path / "copy"))
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    metadata.planner_data = RunsCode(tmp_path / "made")
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"\.metadata asks for posix.mkdir, which could run code, so it is not read"):
        TorchDistReader(copy)
    assert not (tmp_path / "made").exists()
    pickle.loads((copy / ".metadata").read_bytes())
    assert (tmp_path / "made").is_dir(), "the pickle must be one that would have"


PROPERTIES = TensorProperties()
SHARD = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
INDEX = MetadataIndex("a", [0])
PLAN = SavePlan([WriteItem(INDEX, WriteItemType.SHARD, tensor_data=TensorWriteData(SHARD, PROPERTIES, torch.Size([2])))])


def small_metadata(kind: type[Metadata] = Metadata, properties: Any = PROPERTIES, **more: Any) -> Metadata:
    """That of one vector in one file, with what megatron-core adds."""
    metadata = kind({"a": TensorStorageMetadata(properties, torch.Size([2]), [SHARD])}, storage_data={INDEX: _StorageInfo("a", 0, 8)})
    metadata.__dict__ |= {"all_local_plans": [PLAN]} | more
    return metadata


def read_small(content: object, folder: Path) -> Metadata:
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    return read_metadata(folder)


def test_metadata_of_earlier_and_present_releases_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert read_small(small_metadata(), tmp_path).all_local_plans == [PLAN]
    early = read_small(small_metadata(properties=early_torch.TensorProperties(dtype=torch.int8)), tmp_path)
    assert early.state_dict_metadata["a"].properties.dtype == torch.int8
    # megatron-core's own, up to 0.15.
    options = {"fields": [("mcore_data", dict, None)], "namespace": {"__module__": megatron_torch.__name__}}
    earlier_metadata = make_dataclass("MCoreMetadata", bases=(Metadata,), **options)
    earlier_plan = make_dataclass("MCoreSavePlan", bases=(SavePlan,), frozen=True, **options)
    for kind in (earlier_metadata, earlier_plan):
        monkeypatch.setattr(megatron_torch, kind.__name__, kind)
    plan = earlier_plan(PLAN.items, mcore_data={"a": {"prepend_axis_num": 0}})
    found = read_small(small_metadata(earlier_metadata, mcore_data={"a": {}}, all_local_plans=[plan]), tmp_path)
    assert found == small_metadata() and type(found) is Metadata
    assert found.all_local_plans == [PLAN] and type(found.all_local_plans[0]) is SavePlan


class Named:
    """Pickled as ``getattr(owner, name)``, as early Python 3.11 (3.11.2, for one) has it for members of enumerations."""

    def __init__(self, owner: Any, name: str) -> None:
        self.arguments = owner, name

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, str]]:
        return getattr, self.arguments


def test_members_of_enumerations_are_all_that_getattr_gives(tmp_path: Path) -> None:
    for owner, name in ((_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST"), (WriteItemType, "SHARD")):
        assert read_small(small_metadata(planner_data=Named(owner, name)), tmp_path).planner_data is owner[name]
    for owner in (Metadata, PosixPath, Metadata([])):
        with pytest.raises(ValueError, match=r"\.metadata asks for getattr of .*, which could run code"):
            read_small(small_metadata(planner_data=Named(owner, "__init__")), tmp_path)
    with pytest.raises(ValueError, match=r"\.metadata is damaged \(KeyError: '__class__'\)"):
        read_small(small_metadata(planner_data=Named(WriteItemType, "__class__")), tmp_path)


def outside(metadata: Any) -> None:
    info = next(iter(metadata.storage_data.values()))
    info.relative_path = "../" + info.relative_path


def beyond(metadata: Any) -> None:
    entry = metadata.state_dict_metadata["output_layer.weight"]
    entry.size = torch.Size([8, *entry.size[1:]])


@pytest.mark.parametrize(
    "change", [outside, beyond, lambda metadata: metadata.storage_data.clear(), lambda metadata: vars(metadata).clear()]
)
def test_metadata_that_is_none_is_damaged(change: Callable[[Any], None], native: Path, tmp_path: Path) -> None:
    original = (NativeSource(native).path / ".metadata").read_bytes()
    metadata = pickle.loads(original)
    change(metadata)
    for damaged in (pickle.dumps(metadata), original[:-100], b"", b"hello", pickle.dumps([1])):
        (tmp_path / ".metadata").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"\.metadata is damaged .*; copy it again|\.metadata is damaged: it is no list"):
            TorchDistReader(tmp_path)
