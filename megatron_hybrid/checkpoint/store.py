"""The directory of a run's checkpoints: what is in it, what comes next, and which one to continue from.

A checkpoint is written under a name that ends in ``.partial`` and renamed when every rank is done and everything is on the disk, so that
a directory without that ending is complete. Deleting goes the other way round: renamed first.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from megatron_hybrid.checkpoint.agreement import CheckpointError, failing_together, gather
from megatron_hybrid.checkpoint.header import HEADER, header_text, read_header
from megatron_hybrid.checkpoint.manifest import MANIFEST, Manifest, measure, verify_files
from megatron_hybrid.checkpoint.shards import join_shards
from megatron_hybrid.checkpoint.writing import ShardedWrite, Written

LATEST = "latest"
"""File that names the last good checkpoint, for people and scripts."""
PARTIAL = ".partial"
"""Ending of what is not complete: being written, left over, or being deleted."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pending:
    """A save whose files are being written."""

    name: str
    header: dict[str, Any]
    write: ShardedWrite
    needed_bytes: int
    written: Future[Written]


class CheckpointStore:
    """The checkpoints in one directory. Every method is collective over all ranks, and raises on all of them or none.

    Args:
        directory: one that all ranks see; made when it is needed.
        keep_last: complete checkpoints to keep; None for all.
        asynchronous: return from ``save`` as soon as the state is copied to host memory, and write in a background thread.
        group: all ranks, to agree on outcomes; None for torch's default group.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int | None,
        asynchronous: bool,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.directory = directory
        self._keep_last, self._asynchronous, self._group = keep_last, asynchronous, group
        self._pending: _Pending | None = None
        # A thread, not a process: it cannot be left behind or killed alone, and the waiting is done without Python's lock.
        device_index = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._background = ThreadPoolExecutor(1, "checkpoint", initializer=_adopt_device, initargs=(device_index,))

    def save(self, step: int, state: ShardedStateDict, header: dict[str, Any]) -> None:
        """Write a checkpoint of ``state``, or begin to; a save that is still under way is finished first.

        Args:
            step: names the checkpoint; an older one of the same step is replaced once the new one is complete.
            state: as megatron-core's ``dist_checkpointing.save`` takes it. May change as soon as this returns.
            header: plain JSON for ``read_header``, equal on all ranks.

        Raises:
            CheckpointError: it could not be written, or an earlier asynchronous save could not; the last good checkpoint is as it was.
        """
        self.finish_pending(blocking=True)
        name = step_name(step)
        partial = self.directory / (name + PARTIAL)
        write = ShardedWrite(state, partial, snapshot=self._asynchronous, group=self._group)
        needed_bytes = sum(gather(write.size_bytes, self._group))
        with failing_together(self._group):
            if self._is_first_rank:
                self._make_room(partial, needed_bytes)
        self._pending = _Pending(name, header, write, needed_bytes, self._background.submit(write.write))
        if not self._asynchronous:
            self.finish_pending(blocking=True)

    def finish_pending(self, *, blocking: bool) -> None:
        """Complete a save whose files are written on all ranks; without one, do nothing.

        Args:
            blocking: wait for the files; otherwise return when some rank is still writing.

        Raises:
            CheckpointError: a rank could not write its files; the last good checkpoint is as it was.
        """
        pending = self._pending
        if pending is None or not blocking and not all(gather(pending.written.done(), self._group)):
            return
        wait([pending.written])
        self._pending = None
        try:
            with failing_together(self._group):
                written = pending.written.result()
            all_written = gather(written, self._group)
            with failing_together(self._group):
                if self._is_first_rank:
                    self._publish(pending, all_written)
        except (CheckpointError, ValueError) as error:
            free_bytes = shutil.disk_usage(self.directory).free
            if self._is_first_rank:
                shutil.rmtree(self.directory / (pending.name + PARTIAL), ignore_errors=True)
            raise CheckpointError(
                f"could not write {pending.name} to {self.directory} ({pending.needed_bytes:,} bytes needed, {free_bytes:,} available): "
                f"{error}; the checkpoints before it are as they were"
            ) from error

    def newest(self) -> Path | None:
        """Return the newest checkpoint that is sound, or None; every rank gets the same.

        Checkpoints are read in full, from the newest on, until one is as it was written. Each that is passed over is logged as a warning,
        with the reason.

        Raises:
            CheckpointError: there are checkpoints, and none is sound: starting anew in their place would be the end of the run's history.
            ValueError: the newest sound checkpoint has another format version.
        """
        steps: list[int] = []
        with failing_together(self._group):
            if self._is_first_rank:
                steps = self._survey()
        steps = gather(steps, self._group)[0]
        reasons = []
        for step in reversed(steps):
            path = self.directory / step_name(step)
            try:
                verify_files(path, self._group)
            except CheckpointError as error:
                self._warn("skipping checkpoint %s: %s", path.name, error)
                reasons.append(f"{path.name}: {error}")
                continue
            with failing_together(self._group):
                read_header(path)
            return path
        if reasons:
            raise CheckpointError(
                f"no checkpoint in {self.directory} is sound ({'; '.join(reasons)}); restore one, or choose another run_dir to start anew"
            )
        return None

    @property
    def _is_first_rank(self) -> bool:
        return dist.get_rank(self._group) == 0

    def _warn(self, message: str, *arguments: object) -> None:
        if self._is_first_rank:
            _log.warning(message, *arguments)

    def _survey(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first; warns of what looks like more."""
        steps = complete_steps(self.directory)
        for leftover in sorted(self.directory.glob(f"*{PARTIAL}")):
            _log.warning("skipping %s: it was never finished; the next save removes it", leftover)
        pointer = self.directory / LATEST
        if pointer.is_file():
            name = pointer.read_text(errors="replace").strip()
            if name not in map(step_name, steps):
                _log.warning("%s names %s, which is not there", pointer, name)
        return steps

    def _make_room(self, partial: Path, needed_bytes: int) -> None:
        """Make an empty directory for the files, where there is space for them."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)
        free_bytes = shutil.disk_usage(self.directory).free
        if free_bytes < needed_bytes:
            raise CheckpointError(
                f"no space in {self.directory} for {partial.stem}: {needed_bytes:,} bytes needed, {free_bytes:,} available; "
                "free some, lower checkpoint.keep_last, or choose another run_dir"
            )
        partial.mkdir()

    def _publish(self, pending: _Pending, all_written: list[Written]) -> None:
        """Complete the checkpoint on disk, give it its name, and let the oldest go."""
        partial, final = self.directory / (pending.name + PARTIAL), self.directory / pending.name
        files = {name: facts for written in all_written for name, facts in written.files.items()}
        files |= pending.write.complete(all_written)
        (partial / HEADER).write_text(header_text(pending.header))
        files[HEADER] = measure(partial / HEADER)
        manifest = Manifest(files, join_shards(shard for written in all_written for shard in written.shards))
        (partial / MANIFEST).write_text(manifest.to_text(), encoding="ascii")
        for file in partial.iterdir():
            sync_path(file)
        sync_path(partial)
        replaced = _take_name_away(final) if final.exists() else None
        partial.rename(final)
        sync_path(self.directory)
        _replace_text(self.directory / LATEST, pending.name + "\n")
        _log.info("saved %s", final)
        doomed = [] if replaced is None else [replaced]
        if self._keep_last is not None:
            doomed += [_take_name_away(path) for path in self._beyond_keep_last(final)]
        for path in doomed:
            shutil.rmtree(path, ignore_errors=True)

    def _beyond_keep_last(self, newest: Path) -> list[Path]:
        """What is older than the last ``keep_last``; a later step than the newest was found damaged, and does not count."""
        names = [step_name(step) for step in complete_steps(self.directory)]
        older = names[: names.index(newest.name)]
        return [self.directory / name for name in older[: max(0, len(older) - (self._keep_last - 1))]]


def _adopt_device(index: int | None) -> None:
    """Make the writing thread use its rank's GPU: a new thread's is the first, and its copies would be waited for on the wrong stream."""
    if index is not None:
        torch.cuda.set_device(index)


def step_name(step: int) -> str:
    """Return the directory name of the checkpoint after ``step`` optimizer steps.

    >>> step_name(100)
    'step_00000100'
    """
    return f"step_{step:08d}"


def complete_steps(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints in ``directory``, which need not exist, oldest first."""
    matches = (re.fullmatch(r"step_(\d{8,})", path.name) for path in directory.glob("step_*"))
    return sorted(int(match[1]) for match in matches if match)


def _take_name_away(checkpoint: Path) -> Path:
    """Mark a checkpoint as incomplete before it is deleted, since it might be only half deleted; return its new path."""
    return checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.old{PARTIAL}"))


def _replace_text(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text)
    sync_path(temporary)
    os.replace(temporary, file)
    sync_path(file.parent)


def sync_path(path: Path) -> None:
    """Have a file or directory on the disk itself, not only in the kernel's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
