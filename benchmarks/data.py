"""Throughput of tokenise-and-index, against megatron-core's builder fed by sentencepiece directly, and of the loader.

    python -m benchmarks.data [--megabytes 20] [--vocab-size 4096]

The text is the running Python's own standard library. Both ways of indexing read the same JSON lines file and use the same tokenizer, in
one process, by turns; the best of the repetitions counts. Their token files are compared.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

from megatron_hybrid.data.blend import Blend, BlendPhase
from megatron_hybrid.data.corpus import prepare_corpus
from megatron_hybrid.data.indexed import IndexedCorpus, bin_path, idx_path
from megatron_hybrid.data.loader import BatchLoader
from megatron_hybrid.data.source import SampleSource
from megatron_hybrid.data.stream import SampleStream
from megatron_hybrid.data.tokenizer import SentencePieceTokenizer
from megatron_hybrid.data.tokenizer_training import train_sentencepiece


def read_sources(megabytes: int) -> Iterator[str]:
    """Yield Python source files until they make up ``megabytes``."""
    remaining = megabytes << 20
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield text
            remaining -= len(text)
        if remaining < 0:
            return


def index_with_megatron(lines: Path, model_proto: bytes, prefix: Path) -> None:
    """Tokenise and index as Megatron's own preprocessing does: parse, encode, append the end token, hand a tensor to the builder."""
    builder_module = importlib.import_module("megatron.core.datasets.indexed_dataset")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
    builder = builder_module.IndexedDatasetBuilder(str(bin_path(prefix)), dtype=np.uint16)
    with open(lines, encoding="utf-8") as stream:
        for line in stream:
            ids = processor.encode(json.loads(line)["text"])
            ids.append(processor.eos_id())
            builder.add_item(torch.tensor(ids, dtype=torch.int64))
            builder.end_document()
    builder.finalize(str(idx_path(prefix)))


def measure_indexing(folder: Path, megabytes: int, vocab_size: int, repetitions: int) -> Path:
    """Print both throughputs and their ratio; return the prefix of the corpus."""
    texts = list(read_sources(megabytes))
    lines = folder / "text.jsonl"
    lines.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n", "utf-8")
    size_bytes = sum(len(text.encode("utf-8")) for text in texts)
    model_proto = train_sentencepiece(texts[::5], vocab_size)

    def ours(prefix: Path) -> None:
        prepare_corpus([lines], SentencePieceTokenizer(model_proto), prefix, overwrite=True, show_progress=False)

    def theirs(prefix: Path) -> None:
        index_with_megatron(lines, model_proto, prefix)

    ways: dict[str, Callable[[Path], None]] = {"megatron-core builder + sentencepiece": theirs, "tools.preprocess_data, 1 worker": ours}
    best = dict.fromkeys(ways, float("inf"))
    for repetition in tqdm(range(repetitions), desc="tokenise and index"):
        for number, (name, way) in enumerate(ways.items()):
            start = time.perf_counter()
            way(folder / f"corpus{number}.{repetition}")
            best[name] = min(best[name], time.perf_counter() - start)
    prefixes = [folder / f"corpus{number}.0" for number in range(2)]
    same = (
        bin_path(prefixes[0]).read_bytes() == bin_path(prefixes[1]).read_bytes()
        and idx_path(prefixes[0]).read_bytes() == idx_path(prefixes[1]).read_bytes()
    )
    num_tokens = IndexedCorpus(prefixes[1]).num_tokens
    print(f"tokenise and index {size_bytes / 1e6:.1f} MB, {num_tokens:,} tokens, vocabulary {vocab_size}; files equal: {same}")
    for name, seconds in best.items():
        print(f"  {name:40} {size_bytes / seconds / 1e6:7.2f} MB/s {num_tokens / seconds / 1e6:7.2f} M tokens/s")
    slowest, fastest = best.values()
    print(f"  ratio: {slowest / fastest:.2f}")
    if not same:
        sys.exit("error: the two corpora differ")
    return prefixes[1]


def measure_loader(prefix: Path, sequence_length: int, seconds: float) -> None:
    """Print tokens/s of whole batches (int64 tokens and labels, masks, segment ids, hash) for several numbers of threads."""
    print(f"loader, one process, sequence length {sequence_length}, documents reset")
    for num_workers in (0, 1, 2):
        source = SampleSource("text", IndexedCorpus(prefix), sequence_length, seed=0)
        stream = SampleStream([source, source], Blend([BlendPhase(0, (0.7, 0.3))], 0), sequence_length, 0, reset_at_documents=True)
        with BatchLoader(
            stream, position=0, global_batch_size=16, micro_batch_size=4, data_rank=0, data_size=1, num_workers=num_workers
        ) as loader:
            next(loader)
            num_steps, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < seconds:
                next(loader)
                num_steps += 1
        print(f"  {num_workers} threads {num_steps * 16 * sequence_length / elapsed / 1e6:8.1f} M tokens/s")


def main() -> None:
    """Run both measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=20, help="text to tokenise (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="entries of the tokenizer, below 65,500 (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="times each way runs (default: %(default)s)")
    arguments = parser.parse_args()
    importlib.import_module("megatron_hybrid.substrate")
    with tempfile.TemporaryDirectory() as folder:
        prefix = measure_indexing(Path(folder), arguments.megabytes, arguments.vocab_size, arguments.repetitions)
        measure_loader(prefix, sequence_length=512, seconds=2.0)
        measure_loader(prefix, sequence_length=8192, seconds=2.0)


if __name__ == "__main__":
    main()
