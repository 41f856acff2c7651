"""``pretrain``: from a YAML file to a trained run directory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_hybrid.config import ConfigError, dump_config, load_config

_EPILOG = """examples:
  python -m megatron_hybrid pretrain examples/quickstart/config.yaml
  python -m megatron_hybrid pretrain examples/quickstart/config.yaml run_dir=runs/tp2 parallel.data=1 parallel.tensor=2 train.steps=200
  torchrun --nproc-per-node 8 -m megatron_hybrid pretrain run.yaml parallel.tensor=8

Started plainly, it launches the local ranks that the layout needs. Started by torchrun or srun, it uses the ranks it is given. Run again,
it continues from the newest checkpoint.
"""


def main(argv: Sequence[str]) -> int:
    """Parse the command line and train; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_hybrid pretrain",
        description="Pretrain a hybrid model, or continue its pretraining.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file of the run (docs/configuration.md lists every option)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options that replace the file's, such as train.steps=200")
    parser.add_argument("--print-config", action="store_true", help="print the resolved run and stop")
    arguments = parser.parse_intermixed_args(argv)
    try:
        run = load_config(arguments.config, arguments.overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.print_config:
        print(dump_config(run), end="")
        return 0
    # Only now: torch and megatron-core take seconds that a typing error should not have to wait for.
    from megatron_hybrid.substrate.quiet import silence_known_warnings

    silence_known_warnings()
    from megatron_hybrid.pretrain import pretrain
    from megatron_hybrid.substrate.launch import run_on_ranks

    return run_on_ranks(pretrain, run)
