"""A compression end to end on real text: a parent, its scores, the search, pruning, distillation, two baselines and a page.

The text is the running Python's own standard library, prepared as the quickstart does. Each step is a command that can be typed by hand;
this script prints it and runs it. Steps whose result is there are not repeated.

    python -m examples.minipuzzle.demo [KEY=VALUE ...]     options for the compression, such as search.top_k=1
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from examples.quickstart.demo import ROOT, RUN, library_paths, run

EXAMPLES = Path("examples/minipuzzle")


def main() -> int:
    """Run every step; returns the exit code of the first that fails."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    tokenizer, corpus = RUN / "tokenizer.model", RUN / "stdlib"
    text = ["--glob", "*.py", "--input", *library_paths(Path(sysconfig.get_path("stdlib")))]
    steps = [
        ["tools.preprocess_data", "--tokenizer", tokenizer, "--output", corpus, "--holdout", "0.02", "--workers", "2", *text],
        ["megatron_hybrid", "pretrain", EXAMPLES / "parent.yaml"],
        ["tools.minipuzzle", "run", EXAMPLES / "stdlib.yaml", *sys.argv[1:]],
    ]
    if not (ROOT / tokenizer).exists():
        steps.insert(0, ["tools.train_tokenizer", "--vocab-size", "4096", "--max-mb", "8", "--output", tokenizer, *text])
    return next((code for code in (run(*map(str, step)) for step in steps) if code), 0)


if __name__ == "__main__":
    sys.exit(main())
