"""Real text for benchmarks that train: Python, as far as this host has it installed."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from examples.quickstart.demo import NOT_LIBRARY, library_paths, run


def prepare_text(tokenizer: Path, corpus: Path, vocab_size: int, text_mb: float) -> int:
    """Make a tokenizer and a corpus (and ``CORPUS.holdout``) where there are none; return the exit code of the first step that fails."""
    text = ["--glob", "*.py", "--input", *python_text(text_mb)]
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    code = 0
    if not tokenizer.exists():
        code = run("tools.train_tokenizer", "--vocab-size", str(vocab_size), "--max-mb", "16", "--output", str(tokenizer), *text)
    if not code and not corpus.with_name(corpus.name + ".json").exists():
        workers = str(os.cpu_count() or 1)
        options = ["--tokenizer", str(tokenizer), "--output", str(corpus), "--holdout", "0.02", "--workers", workers]
        code = run("tools.preprocess_data", *options, *text)
    return code


def python_text(text_mb: float) -> list[str]:
    """Folders and files of Python text: the standard library, then installed packages by name, until there is ``text_mb`` MB of it."""
    library, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    taken: list[str] = []
    size_bytes = 0
    for path in [*library_paths(library), *sorted(str(path) for path in packages.iterdir() if path.name not in NOT_LIBRARY)]:
        if size_bytes >= text_mb * 1e6:
            break
        files = [Path(path)] if path.endswith(".py") else list(Path(path).rglob("*.py"))
        if files:
            taken.append(path)
            size_bytes += sum(file.stat().st_size for file in files)
    return taken
