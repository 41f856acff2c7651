"""The held-out text that candidates are ranked on and results measured on: all validation sources together."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_hybrid.config import RunConfig
from megatron_hybrid.substrate.context import Substrate


class HeldOut:
    """The validation text, read anew every time it is iterated over.

    Args:
        run: names the sources; they share the tokens evenly.
        substrate: this rank.
        num_tokens: tokens of all sources together, at least.
    """

    def __init__(self, run: RunConfig, substrate: Substrate, num_tokens: int) -> None:
        from megatron_hybrid.data.build import build_validation_streams

        self._run, self._substrate = run, substrate
        self._streams = build_validation_streams(run)
        self.num_samples = -(-num_tokens // (run.data.sequence_length * len(self._streams)))
        if substrate.rank == 0:
            for warning in repeated_text(self._streams, self.num_samples):
                print(warning, file=sys.stderr, flush=True)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        from tools.minipuzzle.forward import read_micro_batches

        for name, stream in self._streams.items():
            for batch in read_micro_batches(stream, self.num_samples, self._run, self._substrate):
                yield name, batch


def repeated_text(streams: Mapping[str, Any], num_samples: int) -> list[str]:
    """Return a warning for each source (a ``SampleStream``) of which ``num_samples`` samples are more than there are."""
    return [
        f"warning: validation source {use.source} is read {use.epochs:.1f} times for its {num_samples * stream.sequence_length:,} of "
        f"search.num_tokens: it has {stream.sources[0].samples_per_epoch * stream.sequence_length:,}, and reading on tells no more; "
        "lower search.num_tokens, or give more held-out text"
        for stream in streams.values()
        for use in stream.usage(0, num_samples)
        if use.epochs > 1
    ]
