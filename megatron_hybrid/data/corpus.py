"""Tokenise and index: documents in, PREFIX.bin, PREFIX.idx and PREFIX.json out.

The inputs are cut into parts by their bytes alone; the parts are built in any order by any number of processes, kept in PREFIX.parts, and
put together in order at the end. So the result is the same to the byte for every number of workers, and after any number of interruptions.
Memory is bounded by the longest document per worker; the disk holds the corpus twice while the parts are put together.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_hybrid.data.documents import InputFile, ReadOptions, find_inputs, plan_parts
from megatron_hybrid.data.indexed import CorpusError, IndexedCorpus, IndexedWriter, idx_path
from megatron_hybrid.data.parts import PartBuilder, SkipCounts, build_parts
from megatron_hybrid.data.report import CorpusReport, load_report, report_path, save_json, save_report
from megatron_hybrid.data.tokenizer import Tokenizer

_FORMAT_VERSION = 1
_NUM_PARTS = 256
_MIN_PART_BYTES = 1 << 20
_MAX_PART_BYTES = 256 << 20
_LOCK_NAME = "lock"
_RECIPE_NAME = "recipe.json"
_WAY_OUT = "write to another prefix, or ask to overwrite it"


@dataclass(frozen=True)
class PreparedCorpus:
    """What ``prepare_corpus`` made or found."""

    report: CorpusReport
    holdout: CorpusReport | None
    """The report of PREFIX.holdout, where a holdout was asked for."""
    reused: bool
    """Whether a complete corpus from the same inputs and options was there already."""


def holdout_prefix(prefix: Path) -> Path:
    """Return the path prefix of the held-out corpus that belongs to ``prefix``."""
    return prefix.with_name(prefix.name + ".holdout")


def prepare_corpus(
    inputs: Sequence[Path | str],
    tokenizer: Tokenizer,
    prefix: Path,
    *,
    pattern: str = "*",
    options: ReadOptions = ReadOptions(),
    holdout: float = 0.0,
    num_workers: int = 1,
    part_size_bytes: int | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> PreparedCorpus:
    """Tokenise ``inputs`` into an indexed corpus at ``prefix``, resuming what an earlier run left unfinished.

    Args:
        inputs: files, folders or globs (``documents.find_inputs``); ``pattern`` is which file names to take from folders.
        holdout: share of the documents, chosen by a hash of their text, that go to PREFIX.holdout instead.
        num_workers: processes. They decide the speed and nothing else.
        part_size_bytes: input bytes per part. Unset: 1/256 of the input, within 1 MiB to 256 MiB.
        overwrite: replace a corpus or unfinished parts made from other inputs or options, which are otherwise refused.

    Raises:
        CorpusError: no usable input, or something else is in the way at ``prefix``; the message says what.
        OSError: the disk is full or a file cannot be read; finished parts are kept.
    """
    if not 0.0 <= holdout < 1.0:
        raise CorpusError(f"holdout is the share of documents to hold out, 0 or more and below 1, got {holdout}")
    if num_workers < 1:
        raise CorpusError(f"workers must be 1 or more, got {num_workers}")
    files = find_inputs(inputs, pattern)
    input_bytes = sum(file.size_bytes for file in files)
    part_size_bytes = part_size_bytes or min(max(input_bytes // _NUM_PARTS, _MIN_PART_BYTES), _MAX_PART_BYTES)
    recipe: dict[str, str | int | float] = {
        "format": _FORMAT_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "inputs": _inputs_digest(files),
        "input_files": len(files),
        "input_bytes": input_bytes,
        "field": options.field,
        "max_document_bytes": options.max_document_bytes,
        "holdout": holdout,
        "part_size_bytes": part_size_bytes,
    }
    complete = _find_complete(prefix, recipe)
    if complete is not None:
        return complete
    parts = plan_parts(files, part_size_bytes)
    folder = prefix.with_name(prefix.name + ".parts")
    with _claimed(folder):
        _settle_recipe(prefix, folder, recipe, overwrite)
        builder = PartBuilder(folder, tokenizer, options, holdout)
        finished = {number for number in range(len(parts)) if builder.is_finished(number)}
        jobs = [(number, slices) for number, slices in enumerate(parts) if number not in finished]
        sizes = [sum(piece.stop - piece.start for piece in slices) for slices in parts]
        done_bytes = sum(sizes[number] for number in finished)
        with tqdm(
            total=input_bytes, initial=done_bytes, unit="B", unit_scale=True, desc=f"tokenise {prefix.name}", disable=not show_progress
        ) as bar:
            build_parts(builder, jobs, num_workers, lambda number: bar.update(sizes[number]))
        prepared = _assemble(builder, len(parts), prefix, recipe, show_progress)
        (folder / _RECIPE_NAME).unlink()
    return prepared


def _assemble(
    builder: PartBuilder, num_parts: int, prefix: Path, recipe: dict[str, str | int | float], show_progress: bool
) -> PreparedCorpus:
    """Put the parts together, the held-out corpus first: the main report says that everything is there."""
    counts = SkipCounts()
    for number in range(num_parts):
        part_counts = builder.counts(number)
        for reason, count in part_counts.skipped.items():
            counts.add(reason, count, part_counts.examples[reason])
    reports: dict[str, CorpusReport] = {}
    for split in reversed(builder.splits()):
        target = holdout_prefix(prefix) if split == "holdout" else prefix
        with IndexedWriter(target, builder.tokenizer.vocab_size) as writer:
            for number in tqdm(range(num_parts), unit="part", desc=f"assemble {target.name}", disable=not show_progress):
                writer.add_corpus(IndexedCorpus(builder.corpus_prefix(number, split)))
            if writer.num_documents == 0:
                raise CorpusError(_nothing_left(split, builder.holdout, counts, target))
        reports[split] = CorpusReport(
            documents=writer.num_documents,
            tokens=writer.num_tokens,
            max_token_id=writer.max_token_id,
            vocab_size=builder.tokenizer.vocab_size,
            eod_id=builder.tokenizer.eod_id,
            tokenizer=builder.tokenizer.fingerprint,
            skipped=counts.skipped if split == "main" else {},
            examples=counts.examples if split == "main" else {},
            recipe=recipe,
        )
        save_report(target, reports[split])
    return PreparedCorpus(reports["main"], reports.get("holdout"), reused=False)


def _nothing_left(split: str, holdout: float, counts: SkipCounts, target: Path) -> str:
    if split == "holdout":
        return f"a holdout of {holdout} chose no document for {target}; raise it, give more documents, or do without"
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.skipped.items())
    return f"no document left for {target}: {f'skipped {reasons}' if reasons else 'all were held out'}; check the inputs and the options"


def _inputs_digest(files: Sequence[InputFile]) -> str:
    lines = "\n".join(f"{file.path}\x00{file.size_bytes}\x00{file.mtime_ns}" for file in files)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def _find_complete(prefix: Path, recipe: dict[str, str | int | float]) -> PreparedCorpus | None:
    """Return the corpus at ``prefix`` if it is whole and made by this recipe."""
    try:
        report = load_report(prefix)
        holdout = load_report(holdout_prefix(prefix)) if recipe["holdout"] else None
        expected = {prefix: report, holdout_prefix(prefix): holdout} if recipe["holdout"] else {prefix: report}
        for place, found in expected.items():
            if found is None or found.recipe != recipe or IndexedCorpus(place).num_tokens != found.tokens:
                return None
    except CorpusError:
        return None
    assert report is not None
    return PreparedCorpus(report, holdout, reused=True)


def _settle_recipe(prefix: Path, folder: Path, recipe: dict[str, str | int | float], overwrite: bool) -> None:
    """Make sure that what stands in the folder, and at the prefix, may be continued or replaced by this recipe."""
    written = folder / _RECIPE_NAME
    found = json.loads(written.read_text(encoding="utf-8")) if written.exists() else None
    if found == recipe:
        return
    if not overwrite:
        if found is not None:
            raise CorpusError(f"{folder} holds parts made with other settings ({_differences(found, recipe)}); {_WAY_OUT}")
        if idx_path(prefix).exists():
            report = load_report(prefix)
            why = "by another tool" if report is None else f"with other settings ({_differences(report.recipe, recipe)}), or is damaged"
            raise CorpusError(f"{prefix} is a corpus made {why}; {_WAY_OUT}")
    for leftover in folder.iterdir():
        if leftover.name != _LOCK_NAME:
            leftover.unlink()
    report_path(prefix).unlink(missing_ok=True)
    save_json(written, recipe)


def _differences(found: dict[str, str | int | float], recipe: dict[str, str | int | float]) -> str:
    names = [name for name in recipe if found.get(name) != recipe[name]]
    return (
        ", ".join(f"{name}: {str(found.get(name))[:12]} there, {str(recipe[name])[:12]} now" for name in names) or "none that is recorded"
    )


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Hold the folder of parts against a second run on the same prefix; the lock falls with the process.

    At the end the folder goes, unless a recipe in it says that there is something to continue.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK_NAME, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(f"{folder} is in use by another run; wait for it, or write to another prefix") from None
        try:
            yield
        finally:
            if not (folder / _RECIPE_NAME).exists():
                shutil.rmtree(folder, ignore_errors=True)
