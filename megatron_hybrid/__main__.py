"""The command line: ``python -m megatron_hybrid VERB ...``; each verb is a few lines over the packages."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence

from megatron_hybrid.interruption import leave_at_once_on

_EPILOG = """examples:
  python -m megatron_hybrid describe nemotron-h-8b parallel.tensor=8
  python -m megatron_hybrid pretrain examples/quickstart/config.yaml
  python -m megatron_hybrid generate runs/quickstart/model --prompt "def main("
  python -m megatron_hybrid serve runs/quickstart/model --port 8000
  python -m megatron_hybrid VERB --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the process's exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m megatron_hybrid",
        description="Pretrain hybrid Mamba-2 / attention / MLP language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=sorted(_VERBS), help="what to do")
    if not arguments or arguments[0] not in _VERBS:
        parser.parse_args(arguments)
    return _VERBS[arguments[0]]()(arguments[1:])


def _describe() -> Callable[[Sequence[str]], int]:
    from megatron_hybrid.describe import main

    return main


def _evaluate() -> Callable[[Sequence[str]], int]:
    from megatron_hybrid.commands.evaluate import main

    return main


def _generate() -> Callable[[Sequence[str]], int]:
    from megatron_hybrid.commands.generate import main

    return main


def _pretrain() -> Callable[[Sequence[str]], int]:
    from megatron_hybrid.commands.pretrain import main

    return main


def _serve() -> Callable[[Sequence[str]], int]:
    from megatron_hybrid.commands.serve import main

    return main


# Verbs are imported when chosen: describe needs no torch and answers at once.
_VERBS = {"describe": _describe, "evaluate": _evaluate, "generate": _generate, "pretrain": _pretrain, "serve": _serve}

if __name__ == "__main__":
    leave_at_once_on(signal.SIGINT)
    sys.exit(main())
