"""The conversion itself: correspondence by correspondence into a directory in the making, so that it can be interrupted."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_hybrid.checkpoint.store import sync_path
from megatron_hybrid.convert.correspondence import correspondences
from megatron_hybrid.convert.source import Source, read_as, target_dtype
from megatron_hybrid.convert.target import Layout, Plan, Target

PARTIAL, REJECTED = ".partial", ".rejected"
"""Endings of a target that is not complete, and of one that the verdict is against."""
_JOURNAL = "conversion.jsonl"
_BYTES_BETWEEN_SYNCS = 1 << 26
_SPARE_BYTES = 1 << 26
"""Room for configuration, metadata and tokenizer."""


def plan_conversion(source: Source, layout: Layout, *, dtype: torch.dtype | None = None, vocab_divisible_by: int | None = None) -> Plan:
    """Decide what a target will hold.

    Args:
        source: what is converted.
        layout: how the target is cut into files.
        dtype: of all but the SSM parameters, which are fp32; None keeps the source's.
        vocab_divisible_by: padding unit of a native target's vocabulary; None keeps the source's.

    Raises:
        ValueError: parts of one tensor have different dtypes in the source.
    """
    model = source.model if vocab_divisible_by is None else source.model.model_copy(update={"vocab_divisible_by": vocab_divisible_by})
    found = correspondences(model)
    return Plan(model, found, tuple(target_dtype(each, source, dtype) for each in found), source.companions, layout)


def run_conversion(source: Source, target: Target, plan: Plan, final: Path) -> Path:
    """Convert everything, or what an interrupted conversion of the same source left, and return the directory in the making.

    Holds one correspondence in memory at a time: at most a tensor and its rearranged copy.

    Args:
        source: what is converted.
        target: what is made of it.
        plan: what ``target`` was made with.
        final: the directory's name when it is complete, which ``publish`` gives it.

    Raises:
        ValueError: ``final`` exists, another conversion into it was interrupted, or there is no room for it.
    """
    if final.exists():
        raise ValueError(f"{final} exists; remove it or choose another target")
    partial = final.with_name(final.name + PARTIAL)
    journal = _Journal(partial / _JOURNAL, fingerprint(source, plan, type(target).__name__))
    sizes = [
        sum(torch.Size(tensor.shape).numel() for tensor in each.native) * dtype.itemsize
        for each, dtype in zip(plan.correspondences, plan.dtypes, strict=True)
    ]
    num_written = len(journal.written)
    _check_space(final, sum(sizes[num_written:]))
    partial.mkdir(parents=True, exist_ok=True)
    journal.open()
    target.open(partial, journal.written)
    unsynced_bytes = 0
    with tqdm(total=sum(sizes), initial=sum(sizes[:num_written]), unit="B", unit_scale=True, desc=f"writing {final.name}") as bar:
        for number in range(num_written, len(sizes)):
            journal.add(target.write(read_as("native", source, plan.correspondences[number], plan.dtypes[number], plan.model)))
            unsynced_bytes += sizes[number]
            if unsynced_bytes > _BYTES_BETWEEN_SYNCS:
                _sync(target)
                journal.save()
                unsynced_bytes = 0
            bar.update(sizes[number])
    _sync(target)
    journal.save()
    target.close()
    journal.close()
    target.finish(partial, journal.written)
    return partial


def publish(partial: Path, final: Path) -> None:
    """Give a complete directory its name, when everything in it is on the disk."""
    (partial / _JOURNAL).unlink()
    for path in [*partial.rglob("*"), partial]:
        sync_path(path)
    partial.rename(final)
    sync_path(final.parent)


def reject(partial: Path, final: Path) -> Path:
    """Set aside a directory that the verdict is against, in place of one set aside before, and return its new name."""
    rejected = final.with_name(final.name + REJECTED)
    shutil.rmtree(rejected, ignore_errors=True)
    (partial / _JOURNAL).unlink()
    return partial.rename(rejected)


def fingerprint(source: Source, plan: Plan, kind: str) -> dict[str, Any]:
    """Return what has to be the same for an interrupted conversion to be continued, as plain JSON."""
    files = sorted(path for path in source.path.iterdir() if path.is_file())
    return {
        "kind": kind,
        "source": str(source.path.absolute()),
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "model": plan.model.model_dump(mode="json"),
        "dtypes": sorted(set(map(str, plan.dtypes))),
        "layout": asdict(plan.layout),
    }


class _Journal:
    """What is written and on the disk: one JSON line for the job, and one for each correspondence."""

    def __init__(self, file: Path, job: dict[str, Any]) -> None:
        self._path, self._job = file, job
        self.written: list[list[dict[str, Any]]] = []
        if not file.is_file():
            if file.parent.exists():
                raise ValueError(f"{file.parent} exists and is no interrupted conversion; remove it or choose another target")
            return
        first, *rest = _complete_lines(file)
        if first != job:
            raise ValueError(
                f"{file.parent} is of another conversion that was interrupted (source or options differ); remove it, or repeat that one"
            )
        self.written = rest

    def open(self) -> None:
        """Write what is known anew, so that a line that was cut off is gone, and stay open for more."""
        anew = self._path.with_suffix(".tmp")
        anew.write_text("".join(json.dumps(line) + "\n" for line in [self._job, *self.written]))
        sync_path(anew)
        os.replace(anew, self._path)
        self._file = self._path.open("a")
        self._num_saved = len(self.written)

    def add(self, records: list[dict[str, Any]]) -> None:
        """Remember a correspondence that is written, though perhaps not on the disk yet."""
        self.written.append(records)

    def save(self) -> None:
        """Put on the disk what was remembered; after the data themselves."""
        self._file.writelines(json.dumps(line) + "\n" for line in self.written[self._num_saved :])
        self._file.flush()
        os.fsync(self._file.fileno())
        self._num_saved = len(self.written)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _complete_lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def _check_space(final: Path, needed_bytes: int) -> None:
    folder = next(path for path in final.absolute().parents if path.exists())
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes + _SPARE_BYTES:
        raise ValueError(f"no space for {final}: {needed_bytes + _SPARE_BYTES:,} bytes needed, {free_bytes:,} available; free some first")


def _sync(target: Target) -> None:
    for file in target.flush():
        os.fsync(file.fileno())
