"""The command line: ``python -m vision_agglom VERB ...``; each verb is a few lines over the packages."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

_EPILOG = """examples:
  python -m vision_agglom describe examples/radio/photographs.yaml
  python -m vision_agglom train examples/radio/photographs.yaml
  python -m vision_agglom evaluate runs/radio/student
  python -m vision_agglom export runs/radio/student runs/radio/exported
  python -m vision_agglom VERB --help
"""

_VERBS = ("describe", "evaluate", "export", "train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the process's exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m vision_agglom",
        description="Distil one vision student from several teachers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=_VERBS, help="what to do")
    if not arguments or arguments[0] not in _VERBS:
        parser.parse_args(arguments)
    # Verbs are imported when chosen: describe needs no torch and answers at once.
    return importlib.import_module(f"vision_agglom.commands.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
