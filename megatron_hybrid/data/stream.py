"""The sample stream of a run: global sample index -> training sample, the same in every layout.

The position in the data is that one index. The stream holds no state, so resuming is going on with the next index, under any number of
ranks and any batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from megatron_hybrid.data.blend import Blend
from megatron_hybrid.data.source import SampleSource


class Sample(TypedDict):
    """One training sample of L = sequence_length tokens."""

    tokens: np.ndarray
    """Input ids, int64 [L]."""
    labels: np.ndarray
    """The id that follows each input, int64 [L]."""
    loss_mask: np.ndarray
    """Weight of each label in the loss, float32 [L]."""
    segment_ids: np.ndarray
    """0, 1, 2... for the documents inside the sample, int32 [L]; all 0 unless the stream resets at documents."""


@dataclass(frozen=True)
class SourceUse:
    """What a stretch of the stream takes from one source."""

    source: str
    samples: int
    share: float
    """Share of the stretch's samples, and so of its tokens."""
    epochs: float
    """Passes over the source that this makes."""


class SampleStream:
    """Random access to the samples of a run; safe to read from several threads.

    With ``reset_at_documents``, segment ids count the documents inside a sample, and a label that is the first token of another document
    has weight 0 (no input of its own document predicts it). Without, documents run into one another and every label counts, as is
    Megatron's default.

    Args:
        sources: in the order of the blend's weights.
        blend: which source each global sample index falls to.
        sequence_length: tokens per sample (L).
    """

    def __init__(self, sources: Sequence[SampleSource], blend: Blend, sequence_length: int, seed: int, reset_at_documents: bool) -> None:
        assert all(len(phase.weights) == len(sources) for phase in blend.phases), "one weight per source in every phase"
        self.sources = tuple(sources)
        self.blend = blend
        self.sequence_length = sequence_length
        self._seed = seed
        self._reset_at_documents = reset_at_documents

    def __getitem__(self, index: int) -> Sample:
        """Return the sample at global index ``index``, 0 or more; the stream has no end."""
        _, source, sample = self.blend.locate(index)
        tokens, boundaries = self.sources[source].read(sample)
        length = self.sequence_length
        loss_mask = np.ones(length, dtype=np.float32)
        segment_ids = np.zeros(length, dtype=np.int32)
        if self._reset_at_documents:
            # Input t's label is token t + 1, which is foreign where a document begins at t + 1.
            loss_mask[boundaries - 1] = 0.0
            segment_ids[boundaries[boundaries < length]] = 1
            np.cumsum(segment_ids, out=segment_ids)
        return Sample(tokens=tokens[:-1], labels=tokens[1:], loss_mask=loss_mask, segment_ids=segment_ids)

    def usage(self, start: int, stop: int) -> list[SourceUse]:
        """Return what samples ``start`` to ``stop`` take from each source."""
        used = self.blend.used_before(stop) - self.blend.used_before(start)
        total = max(stop - start, 1)
        return [
            SourceUse(source.name, int(samples), int(samples) / total, int(samples) / source.samples_per_epoch)
            for source, samples in zip(self.sources, used, strict=True)
        ]

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides the stream, as JSON data for a checkpoint (see ``require_same_data``)."""
        names = [source.name for source in self.sources]
        return {
            "sequence_length": self.sequence_length,
            "seed": self._seed,
            "reset_at_documents": self._reset_at_documents,
            "sources": {source.name: source.digest() for source in self.sources},
            "phases": [
                {"start_sample": phase.start_sample, "blend": dict(zip(names, map(float, phase.weights), strict=True))}
                for phase in self.blend.phases
            ],
        }


def require_same_data(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to go on with another stream than the one a checkpoint was trained on.

    What may change on resume is what the fingerprint does not hold: the data-parallel size, the micro and global batch size, the number of
    read-ahead threads, where the corpora lie.

    Raises:
        ValueError: the fingerprints differ; names each difference.
    """
    differences = _differences("data", saved, current)
    if differences:
        raise ValueError(
            "the checkpoint was trained on another data stream: " + "; ".join(differences) + ". Restore these settings or corpora, "
            "or start a new run from the weights alone (checkpoint.initialize_from)"
        )


def _differences(path: str, saved: Any, current: Any) -> list[str]:
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = list(dict.fromkeys([*saved, *current]))
        return [found for key in keys for found in _differences(f"{path}.{key}", saved.get(key, "absent"), current.get(key, "absent"))]
    if isinstance(saved, list) and isinstance(current, list) and len(saved) == len(current):
        return [found for number, pair in enumerate(zip(saved, current, strict=True)) for found in _differences(f"{path}[{number}]", *pair)]
    return [] if saved == current else [f"{path} was {saved}, is {current}"]
