"""What the verbs' command lines have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vision_agglom.config.load import load_config
from vision_agglom.config.schema import VisionConfig


def verb_parser(verb: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser of one verb, whose help ends with examples."""
    return argparse.ArgumentParser(
        prog=f"python -m vision_agglom {verb}", description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """A run's YAML file and options that replace the file's."""
    parser.add_argument("config", help="YAML file of the run (docs/vision.md describes the options)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options that replace the file's, such as optimizer.lr=1e-3")


def read_config(config: str, overrides: Sequence[str]) -> VisionConfig | None:
    """The run, or None after saying what is wrong with it, its evaluation included: no run is trained that could not be measured."""
    try:
        run = load_config(config, overrides)
        run.check_evaluation()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return None
    return run
