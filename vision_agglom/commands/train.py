"""``train``: from a YAML file to a trained run directory."""

from __future__ import annotations

from collections.abc import Sequence

from vision_agglom.commands.arguments import add_config, read_config, verb_parser
from vision_agglom.config.load import dump_config

_EPILOG = """examples:
  python -m vision_agglom train examples/radio/photographs.yaml
  python -m vision_agglom train examples/radio/photographs.yaml run_dir=runs/radio/tp2 parallel.tensor=2
  torchrun --nproc-per-node 8 -m vision_agglom train examples/radio/radio_v2.5.yaml train.teacher_ranks=partitioned

Started plainly, it launches the local ranks that the layout needs. Started by torchrun or srun, it uses the ranks it is given. Run again,
it continues from the newest checkpoint.
"""


def main(argv: Sequence[str]) -> int:
    """Parse the command line and train; returns the exit code."""
    parser = verb_parser("train", "Distil a student from its teachers, or continue to.", _EPILOG)
    add_config(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resolved run and stop")
    arguments = parser.parse_intermixed_args(argv)
    run = read_config(arguments.config, arguments.overrides)
    if run is None:
        return 2
    if arguments.print_config:
        print(dump_config(run), end="")
        return 0
    # Only now: torch and megatron-core take seconds that a typing error should not have to wait for.
    from megatron_hybrid.substrate.quiet import silence_known_warnings

    silence_known_warnings()
    from megatron_hybrid.substrate.launch import run_on_ranks
    from vision_agglom.train import train

    return run_on_ranks(train, run)
