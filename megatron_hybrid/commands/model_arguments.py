"""Which model, on which ranks: the arguments that the verbs which run a trained model share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_hybrid.config import RunConfig


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them; ``load_requested_run`` reads them."""
    parser.add_argument("model", type=Path, help="run directory of a pretraining run, or directory of a Hugging Face NemotronH model")
    parser.add_argument("--checkpoint", metavar="STEP", type=int, help="use the checkpoint of this step (default: the newest sound one)")
    parser.add_argument("--tensor", metavar="N", type=int, default=1, help="tensor-parallel ranks, whatever layout trained it (default: 1)")
    parser.add_argument("--pipeline", metavar="N", type=int, default=1, help="pipeline stages (default: 1)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="to compute in (default: the model's own)")


def load_requested_run(arguments: argparse.Namespace) -> RunConfig:
    """Return the configuration to launch the ranks with.

    Raises:
        ValueError: there is no such model, or it cannot be cut that way.
    """
    from megatron_hybrid.generate.load import load_run

    return load_run(arguments.model, tensor=arguments.tensor, pipeline=arguments.pipeline, precision=arguments.precision)
