"""The command line: ``python -m tools.minipuzzle VERB CONFIG [KEY=VALUE ...]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import get_args

from tools.minipuzzle.config import MiniPuzzleConfig, Stage, load_minipuzzle

_EPILOG = """examples:
  python -m tools.minipuzzle search examples/minipuzzle/nemotron_h_56b.yaml        the paper's search, in seconds, without weights
  python -m tools.minipuzzle run examples/minipuzzle/stdlib.yaml                   everything; again: goes on where it was stopped
  python -m tools.minipuzzle score run.yaml parallel.tensor=2 score.layer_samples=32
  torchrun --nproc-per-node 8 -m tools.minipuzzle score run.yaml parallel.tensor=8

report times decoding of parent and winner first, where that is not done, on the device that it is called on.
Every stage leaves a file in work_dir that the next one reads: scores.json, candidates.json, pruned/NAME, short/NAME, long/NAME,
results.json, report.html. docs/minipuzzle.md says what is in them and what may be edited.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.minipuzzle",
        description="Compress a hybrid model to a memory or latency target: score, search, prune, distil (arXiv 2504.03624, section 3).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=[*_VERBS, "run"], help="the stage; run: all of them, as far as they are not done")
    parser.add_argument("config", help="YAML file of the compression")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options that replace the file's, such as search.top_k=2")
    parser.add_argument("--until", choices=get_args(Stage), help="run: the last stage to do (default: report, with the timing of decoding)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.until and arguments.verb != "run":
        parser.error(f"--until means something only with run; drop it, or say run instead of {arguments.verb}")
    from megatron_hybrid.substrate.quiet import silence_known_warnings

    silence_known_warnings()
    try:
        config = load_minipuzzle(arguments.config, arguments.overrides)
        return _run(config, arguments.until or "report") if arguments.verb == "run" else _VERBS[arguments.verb](config)
    except (Exception, KeyboardInterrupt) as error:
        from megatron_hybrid.substrate.failure import describe_failure

        code, text = describe_failure(error, load_minipuzzle)
        print(text, file=sys.stderr)
        return code


def _score(config: MiniPuzzleConfig) -> int:
    from tools.minipuzzle.score import score

    return score(config)


def _search(config: MiniPuzzleConfig) -> int:
    from tools.minipuzzle.rank import search

    return search(config)


def _prune(config: MiniPuzzleConfig) -> int:
    from tools.minipuzzle.run import prune

    return prune(config)


def _distill(config: MiniPuzzleConfig) -> int:
    from tools.minipuzzle.run import distill

    return distill(config)


def _run(config: MiniPuzzleConfig, until: Stage) -> int:
    from tools.minipuzzle.run import run

    return run(config, until)


def _report(config: MiniPuzzleConfig) -> int:
    from tools.minipuzzle.run import report

    return report(config)


_VERBS: dict[str, Callable[[MiniPuzzleConfig], int]] = {
    "score": _score,
    "search": _search,
    "prune": _prune,
    "distill": _distill,
    "report": _report,
}

if __name__ == "__main__":
    sys.exit(main())
