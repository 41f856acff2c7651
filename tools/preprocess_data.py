"""Tokenise and index text for training: ``python -m tools.preprocess_data --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_hybrid.data.corpus import PreparedCorpus, holdout_prefix, prepare_corpus
from megatron_hybrid.data.documents import ReadOptions
from megatron_hybrid.data.tokenizer import load_tokenizer, tokenizer_kind
from tools.failure import EXIT_CODES, run_tool

EXAMPLE = """example:
  python -m tools.preprocess_data --input books/ "web/*.jsonl.gz" --tokenizer tokenizer.model --output data/mixed --holdout 0.02 --workers 8

writes data/mixed.bin, .idx and .json (counts, skipped documents) and data/mixed.holdout.*; data/mixed is then a source of a run's
configuration. An interrupted run continues where it stopped when the same command is given again."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.preprocess_data",
        description="Tokenise JSON lines, plain text and folders into Megatron's .bin and .idx.",
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
    parser.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece .model, tokenizer.json, or a Hugging Face folder")
    parser.add_argument("--tokenizer-kind", choices=("sentencepiece", "huggingface"), help="default: by the path")
    parser.add_argument("--eod-token", help="token that ends a document; default: the tokenizer's own end token")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="path prefix of the corpus")
    parser.add_argument("--glob", default="*", metavar="PATTERN", help='file names to take from folders, such as "*.py"')
    parser.add_argument("--field", default=ReadOptions.field, help="JSON field that holds the text (default: %(default)s)")
    parser.add_argument("--holdout", type=float, default=0.0, metavar="SHARE", help="share of documents for PREFIX.holdout (default: none)")
    parser.add_argument(
        "--max-document-mb",
        type=int,
        default=ReadOptions.max_document_bytes >> 20,
        help="longer documents are skipped (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s); the result does not depend on it")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus made from other inputs or options")
    return parser


def describe(prepared: PreparedCorpus, prefix: Path) -> str:
    """Return what was prepared, and what was left out and why, as lines of text."""
    lines = [f"{prefix}: complete already, from the same inputs and options; reused"] if prepared.reused else []
    for name, report in ((prefix, prepared.report), (holdout_prefix(prefix), prepared.holdout)):
        if report is not None:
            lines.append(f"{name}: {report.documents:,} documents, {report.tokens:,} tokens")
    for reason, count in sorted(prepared.report.skipped.items()):
        lines.append(f"skipped {count:,}: {reason} (such as {prepared.report.examples[reason][0]})")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: see the help."""
    arguments = build_parser().parse_args(argv)
    return run_tool(lambda: _prepare(arguments), "finished parts are kept; the same command continues")


def _prepare(arguments: argparse.Namespace) -> None:
    kind = arguments.tokenizer_kind or tokenizer_kind(arguments.tokenizer)
    prepared = prepare_corpus(
        arguments.input,
        load_tokenizer(kind, arguments.tokenizer, arguments.eod_token),
        arguments.output,
        pattern=arguments.glob,
        options=ReadOptions(arguments.field, arguments.max_document_mb << 20),
        holdout=arguments.holdout,
        num_workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    print(describe(prepared, arguments.output))


if __name__ == "__main__":
    sys.exit(main())
