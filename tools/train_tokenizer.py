"""Train a sentencepiece tokenizer: ``python -m tools.train_tokenizer --help``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_hybrid.data.documents import Document, InputFile, ReadOptions, find_inputs, plan_parts, read_documents
from megatron_hybrid.data.hashing import seeded_permutation
from megatron_hybrid.data.indexed import naming_full_disk
from megatron_hybrid.data.tokenizer_training import train_sentencepiece
from tools.failure import EXIT_CODES, run_tool

EXAMPLE = """example:
  python -m tools.train_tokenizer --input books/ web.jsonl --vocab-size 32000 --output tokenizer.model"""

_SLICE_BYTES = 1 << 20


def sample_documents(files: Sequence[InputFile], options: ReadOptions) -> Iterator[str]:
    """Yield usable documents from all over the inputs, in a shuffled order that depends on their number and sizes alone."""
    parts = plan_parts(files, _SLICE_BYTES)
    for number in seeded_permutation(len(parts), "tokenizer sample"):
        for piece in parts[number]:
            yield from (item.text for item in read_documents(piece, options) if isinstance(item, Document))


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_tokenizer",
        description="Train a BPE tokenizer with byte fallback that gives back every text exactly.",
        epilog=f"{EXAMPLE}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders or globs; .jsonl[.gz] by line, others one document per file",
    )
    parser.add_argument("--output", type=Path, required=True, help="the .model file to write")
    parser.add_argument("--vocab-size", type=int, default=32000, help="entries, the 256 bytes included (default: %(default)s)")
    parser.add_argument("--glob", default="*", metavar="PATTERN", help='file names to take from folders, such as "*.py"')
    parser.add_argument("--field", default=ReadOptions.field, help="JSON field that holds the text (default: %(default)s)")
    parser.add_argument("--max-mb", type=int, default=64, help="text to learn from, taken from all over the inputs (default: %(default)s)")
    return parser


def train_tokenizer(files: Sequence[InputFile], output: Path, vocab_size: int, options: ReadOptions, max_bytes: int) -> None:
    """Train a tokenizer on a sample of the documents in ``files`` and write it, whole or not at all.

    Raises:
        ValueError: the inputs hold no text, or too little for the vocabulary.
        OSError: the disk is full or a file cannot be read.
    """
    documents = tqdm(sample_documents(files, options), unit="doc", desc="read text")
    model = train_sentencepiece(documents, vocab_size, max_bytes=max_bytes)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    with naming_full_disk(partial):
        partial.write_bytes(model)
    os.replace(partial, output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: see the help."""
    arguments = build_parser().parse_args(argv)
    return run_tool(lambda: _train(arguments), "nothing is written")


def _train(arguments: argparse.Namespace) -> None:
    files = find_inputs(arguments.input, arguments.glob)
    train_tokenizer(files, arguments.output, arguments.vocab_size, ReadOptions(field=arguments.field), arguments.max_mb << 20)
    print(f"{arguments.output}: {arguments.vocab_size:,} entries")


if __name__ == "__main__":
    sys.exit(main())
