"""A compression end to end on real text: the quickstart's model, its scores, the search, pruning, distillation, two baselines and a page.

The quickstart's steps come first, as far as their results are not there; each step is a command that can be typed by hand; this script
prints it and runs it. Started again, it goes on where it was stopped.

    python -m examples.minipuzzle.demo [KEY=VALUE ...]     options for the compression, such as search.top_k=1
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from examples.quickstart.demo import CONFIG, ROOT, RUN, library_paths, run


def main() -> int:
    """Run every step; returns the exit code of the first that fails."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    tokenizer, corpus = RUN / "tokenizer.model", RUN / "stdlib"
    text = ["--glob", "*.py", "--input", *library_paths(Path(sysconfig.get_path("stdlib")))]
    steps = [
        ["tools.preprocess_data", "--tokenizer", tokenizer, "--output", corpus, "--holdout", "0.02", "--workers", "2", *text],
        ["megatron_hybrid", "pretrain", CONFIG],
        ["tools.minipuzzle", "run", "examples/minipuzzle/stdlib.yaml", *sys.argv[1:]],
    ]
    if not (ROOT / tokenizer).exists():
        steps.insert(0, ["tools.train_tokenizer", "--vocab-size", "4096", "--max-mb", "8", "--output", tokenizer, *text])
    return next((code for code in (run(*map(str, step)) for step in steps) if code), 0)


if __name__ == "__main__":
    sys.exit(main())
