"""A conversion can be interrupted anywhere and continued, appears only when it is complete, and refuses what cannot end well."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.convert import job
from megatron_hybrid.convert.hub import HubSource, HubTarget
from megatron_hybrid.convert.job import plan_conversion, publish, run_conversion
from megatron_hybrid.convert.megatron import MegatronTarget
from megatron_hybrid.convert.native import NativeTarget
from megatron_hybrid.convert.target import Layout, Plan, Target

MAKERS: dict[str, Callable[[Plan, Path], Target]] = {
    "hf": lambda plan, final: HubTarget(plan),
    "native": NativeTarget,
    "megatron": MegatronTarget,
}
LAYOUT = Layout(shard_bytes=50_000)
TENSOR_LAYOUT = Layout(tensor=2, pipeline=2)


class Stop(Exception):
    """Stands for a kill."""


class StoppingSource(HubSource):
    """Fails at the tensor of a given number."""

    num_left = 10**9

    def read(self, name: str) -> Any:
        self.num_left -= 1
        if self.num_left < 0:
            raise Stop
        return super().read(name)


def convert(kind: str, path: Path, final: Path, *, num_reads: int = 10**9) -> None:
    source = StoppingSource(path)
    source.num_left = num_reads
    plan = plan_conversion(source, LAYOUT if kind == "hf" else TENSOR_LAYOUT)
    publish(run_conversion(source, MAKERS[kind](plan, final), plan, final), final)


def digests(folder: Path) -> dict[str, str]:
    """File -> digest of everything below a folder; pickles have paths and ids in them that are not the same twice."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("config.yaml", ".metadata", "manifest.json"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("kind", MAKERS)
def test_interrupted_conversions_are_continued(kind: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(kind, hub, tmp_path / "whole")
    # Something is on the disk after every tensor, or after every few of them.
    for sync_bytes in (0, 20_000):
        monkeypatch.setattr(job, "_BYTES_BETWEEN_SYNCS", sync_bytes)
        for num_reads in (0, 3, 5, 11):
            with pytest.raises(Stop):
                convert(kind, hub, tmp_path / "parts", num_reads=num_reads)
            assert not (tmp_path / "parts").exists() and (tmp_path / "parts.partial").is_dir()
            # As if the process had been killed in the middle of a write.
            for file in (tmp_path / "parts.partial").rglob("__*.distcp"):
                file.write_bytes(file.read_bytes() + b"half a tensor")
            with (tmp_path / "parts.partial/conversion.jsonl").open("a") as journal:
                journal.write('[{"key": "half a li')
        convert(kind, hub, tmp_path / "parts")
        assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
        assert not (tmp_path / "parts.partial").exists()
        shutil.rmtree(tmp_path / "parts")


def test_what_is_written_is_not_read_again(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_BYTES_BETWEEN_SYNCS", 0)
    with pytest.raises(Stop):
        convert("native", hub, tmp_path / "parts", num_reads=30)
    num_tensors = len(HubSource(hub).specs)
    convert("native", hub, tmp_path / "parts", num_reads=num_tensors - 29)


@pytest.mark.parametrize("kind", MAKERS)
def test_an_interrupted_verdict_is_continued(kind: str, hub: Path, tmp_path: Path) -> None:
    """Everything is written, and nothing published: the same command ends the work without reading a tensor."""
    convert(kind, hub, tmp_path / "whole")
    source = StoppingSource(hub)
    plan = plan_conversion(source, LAYOUT if kind == "hf" else TENSOR_LAYOUT)
    run_conversion(source, MAKERS[kind](plan, tmp_path / "again"), plan, tmp_path / "again")
    convert(kind, hub, tmp_path / "again", num_reads=0)
    assert digests(tmp_path / "again") == digests(tmp_path / "whole")


def test_another_conversion_does_not_continue(hub: Path, tmp_path: Path) -> None:
    source = StoppingSource(hub)
    with pytest.raises(Stop):
        convert("native", hub, tmp_path / "target", num_reads=3)
    plan = plan_conversion(source, Layout())
    with pytest.raises(ValueError, match="of another conversion that was interrupted"):
        run_conversion(source, NativeTarget(plan, tmp_path / "target"), plan, tmp_path / "target")


def test_nothing_is_overwritten(hub: Path, tmp_path: Path) -> None:
    source = HubSource(hub)
    plan = plan_conversion(source, Layout())
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists; remove it"):
        run_conversion(source, HubTarget(plan), plan, tmp_path / "there")
    (tmp_path / "other.partial").mkdir()
    with pytest.raises(ValueError, match="is no interrupted conversion"):
        run_conversion(source, HubTarget(plan), plan, tmp_path / "other")


def test_space_is_looked_at_first(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = HubSource(hub)
    plan = plan_conversion(source, Layout())
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"no space for .*: 67,\d{3},\d{3} bytes needed, 1,000 available"):
        run_conversion(source, HubTarget(plan), plan, tmp_path / "new" / "target")
    assert not (tmp_path / "new").exists()
