"""The main job end to end on real text: tokenizer, corpus, pretraining on two ranks, evaluation, checkpoint, loss curve, generation.

The text is the running Python's own standard library, sources and docstrings. Each step is a command that can be typed by hand; this script
prints it and runs it. Steps whose result is there are not repeated: pretraining continues from its last checkpoint.

    python examples/quickstart/demo.py [KEY=VALUE ...]     options for the pretraining, such as train.steps=600
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path("examples/quickstart/config.yaml")
RUN = Path("runs/quickstart")
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "lib-dynload", "__pycache__"}
PROMPTS = ("import os\n\ndef read_lines(path):\n", "class Queue:\n    ", "# Return the number of\n")


def main() -> int:
    """Run every step; returns the exit code of the first that fails."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    library = library_paths(Path(sysconfig.get_path("stdlib")))
    tokenizer, corpus = RUN / "tokenizer.model", RUN / "stdlib"
    steps = [
        [
            "tools.preprocess_data",
            "--tokenizer",
            tokenizer,
            "--output",
            corpus,
            "--holdout",
            "0.02",
            "--workers",
            "2",
            "--glob",
            "*.py",
            "--input",
            *library,
        ],
        ["megatron_hybrid", "pretrain", CONFIG, *sys.argv[1:]],
        ["megatron_hybrid", "generate", RUN / "model", "--max-new-tokens", "48", "--temperature", "0.7", "--top-p", "0.9"]
        + [word for prompt in PROMPTS for word in ("--prompt", prompt)],
    ]
    if not (ROOT / tokenizer).exists():
        steps.insert(
            0,
            [
                "tools.train_tokenizer",
                "--vocab-size",
                "4096",
                "--max-mb",
                "8",
                "--output",
                tokenizer,
                "--glob",
                "*.py",
                "--input",
                *library,
            ],
        )
    for step in steps:
        code = run(*map(str, step))
        if code:
            return code
    print(f"\nrun directory  {RUN / 'model'}\nloss curve     {RUN / 'model' / 'loss.png'}")
    return 0


def library_paths(library: Path) -> list[str]:
    """Modules and packages of the standard library, without what is installed beside it and without its tests."""
    entries = (path for path in library.iterdir() if path.name not in NOT_LIBRARY)
    return sorted(str(path) for path in entries if path.suffix == ".py" or (path / "__init__.py").exists())


def run(module: str, *arguments: str) -> int:
    """Print a command, shortened where it names the whole library, and run it."""
    shown = [shlex.quote(word) for word in arguments]
    if "--input" in arguments:
        shown[arguments.index("--input") + 2 :] = ["..."]
    print(f"\n$ python -m {module} {' '.join(shown)}", flush=True)
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment()).returncode


def environment() -> dict[str, str]:
    """This process's, with this checkout in front of whatever else Python is told to look at."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


if __name__ == "__main__":
    sys.exit(main())
