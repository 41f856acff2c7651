"""From a run's configuration to its sample streams, with every check that can be made before training starts."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from tqdm import tqdm

from megatron_hybrid.config.quantities import resolve_position
from megatron_hybrid.config.schema import RunConfig
from megatron_hybrid.data.blend import Blend, BlendPhase
from megatron_hybrid.data.indexed import CorpusError, IndexedCorpus, bin_path
from megatron_hybrid.data.report import load_report, save_json
from megatron_hybrid.data.source import SampleSource
from megatron_hybrid.data.stream import SampleStream, SourceUse
from megatron_hybrid.data.tokenizer import Tokenizer, load_tokenizer

EPOCH_CAP = 4.0
"""Passes over a source above which repeated text stops paying (Muennighoff et al. 2023; Nemotron-H caps at 4 to 8)."""

_SCAN_TOKENS = 1 << 24


def build_tokenizer(config: RunConfig) -> Tokenizer | None:
    """Return the run's tokenizer, None where the configuration names none.

    Raises:
        ValueError: it cannot be read, or its vocabulary is larger than the model's.
    """
    if config.data.tokenizer is None:
        return None
    tokenizer = load_tokenizer(config.data.tokenizer.kind, config.data.tokenizer.path, config.data.tokenizer.eod_token)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"tokenizer {config.data.tokenizer.path} has {tokenizer.vocab_size} tokens but model.vocab_size={config.model.vocab_size}; "
            f"raise model.vocab_size to at least {tokenizer.vocab_size}"
        )
    return tokenizer


def build_train_stream(config: RunConfig) -> SampleStream:
    """Return the training stream, after checking its corpora.

    Raises:
        ValueError: a corpus is missing, damaged, shorter than a sample, made by another tokenizer than the configuration names, or holds
            ids that the model has not.
    """
    tokenizer = build_tokenizer(config)
    sources = [_open_source(name, prefix, config, tokenizer) for name, prefix in config.data.sources.items()]
    sizes = tuple(float(source.corpus.num_tokens) for source in sources)
    phases = []
    for phase in config.data.phases:
        start = math.ceil(resolve_position(phase.start, config.total_tokens) / config.data.sequence_length)
        weights = tuple(phase.blend.get(source.name, 0.0) for source in sources) if phase.blend else sizes
        phases.append(BlendPhase(start, weights))
    return SampleStream(sources, Blend(phases, config.seed), config.data.sequence_length, config.seed, config.data.reset_at_documents)


def build_validation_streams(config: RunConfig) -> dict[str, SampleStream]:
    """Return a stream for each validation source; validation reads each from sample 0, so every time the same samples.

    Raises:
        ValueError: as ``build_train_stream``.
    """
    tokenizer = build_tokenizer(config)
    streams = {}
    for name, prefix in config.validation.sources.items():
        source = _open_source(name, prefix, config, tokenizer)
        blend = Blend([BlendPhase(0, (1.0,))], config.seed)
        streams[name] = SampleStream([source], blend, config.data.sequence_length, config.seed, config.data.reset_at_documents)
    return streams


def describe_blend(stream: SampleStream, num_samples: int) -> str:
    """Return a table of what each phase, and the whole run of ``num_samples``, takes from each source, warning of many repetitions."""
    starts = [phase.start_sample for phase in stream.blend.phases if phase.start_sample < num_samples]
    stretches = [
        (f"phase {number}", start, stop) for number, (start, stop) in enumerate(zip(starts, [*starts[1:], num_samples], strict=True))
    ]
    if len(stretches) > 1:
        stretches.append(("run", 0, num_samples))
    width = max(len(source.name) for source in stream.sources)
    lines = [f"{'':8} {'source':{width}} {'tokens':>16} {'share':>7} {'epochs':>8}"]
    for label, start, stop in stretches:
        lines += [_use_line(label, use, width, stream.sequence_length) for use in stream.usage(start, stop)]
    for use in stream.usage(0, num_samples):
        if use.epochs > EPOCH_CAP:
            lines.append(
                f"warning: {use.source} is repeated {use.epochs:.1f} times over the run; text loses its worth after about {EPOCH_CAP:.0f}"
            )
    return "\n".join(lines)


def _use_line(label: str, use: SourceUse, width: int, sequence_length: int) -> str:
    return f"{label:8} {use.source:{width}} {use.samples * sequence_length:16,} {use.share:7.2%} {use.epochs:8.3f}"


def _open_source(name: str, prefix: Path, config: RunConfig, tokenizer: Tokenizer | None) -> SampleSource:
    corpus = IndexedCorpus(prefix)
    report = load_report(prefix)
    if report is not None and report.tokens != corpus.num_tokens:
        raise CorpusError(
            f"{prefix}.json reports {report.tokens} tokens but {bin_path(prefix)} holds {corpus.num_tokens}: they belong to different "
            "corpora; build it again"
        )
    if report is not None and tokenizer is not None and report.tokenizer != tokenizer.fingerprint:
        raise CorpusError(
            f"source {name!r} ({prefix}) was made by another tokenizer than data.tokenizer; build it again, or name the tokenizer that "
            "made it"
        )
    largest = _scan_largest_token(corpus) if report is None else report.max_token_id
    if largest >= config.model.vocab_size:
        raise CorpusError(
            f"source {name!r} ({prefix}) holds token id {largest} but model.vocab_size={config.model.vocab_size}; raise it, or use the "
            "tokenizer of this model"
        )
    return SampleSource(name, corpus, config.data.sequence_length, config.seed)


def _scan_largest_token(corpus: IndexedCorpus) -> int:
    """Return the largest id of a corpus without a report, reading all of it once; the finding is kept beside it where the folder is
    writable.
    """
    kept = corpus.prefix.with_name(corpus.prefix.name + ".scan.json")
    status = bin_path(corpus.prefix).stat()
    identity = {"size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if {name: found.get(name) for name in identity} == identity:
        return found["max_token_id"]
    largest = -1
    with tqdm(total=corpus.num_tokens, unit="token", unit_scale=True, desc=f"scan {corpus.prefix.name}", disable=None) as bar:
        for start in range(0, corpus.num_tokens, _SCAN_TOKENS):
            block = corpus.tokens[start : start + _SCAN_TOKENS]
            if int(block.min()) < 0:
                raise CorpusError(f"{bin_path(corpus.prefix)} holds the negative token id {int(block.min())}; build the corpus again")
            largest = max(largest, int(block.max()))
            bar.update(block.size)
    if os.access(kept.parent, os.W_OK):
        save_json(kept, {**identity, "max_token_id": largest})
    return largest
