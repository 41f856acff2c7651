"""``evaluate``: a trained model in EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid.commands.model_arguments import add_model_arguments, load_requested_run
from megatron_hybrid.commands.output_file import check_output_file
from megatron_hybrid.interruption import leave_at_once_on

if TYPE_CHECKING:
    from megatron_hybrid.config import RunConfig
    from megatron_hybrid.evaluate.tasks import Tasks
    from megatron_hybrid.generate.session import Session
    from megatron_hybrid.substrate import ExitCode, Substrate

_EPILOG = """examples:
  python -m megatron_hybrid evaluate runs/quickstart/model --tasks my_tasks/facts.yaml --output results.json
  python -m megatron_hybrid evaluate models/nemotron-h-8b --tensor 2 --tasks hellaswag arc_easy --num-fewshot 5 --limit 200

A task is a name that the harness knows (its data then come from the Hugging Face hub) or a YAML file in the harness's format.
"""


def main(argv: Sequence[str]) -> int:
    """Parse the command line and evaluate; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_hybrid evaluate",
        description="Evaluate a trained model with lm-evaluation-harness.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names of tasks, or YAML files that define them")
    parser.add_argument("--num-fewshot", metavar="N", type=int, help="examples in the prompt (default: the task's own)")
    parser.add_argument("--limit", metavar="N", type=int, help="documents of each task (default: all)")
    parser.add_argument("--chat", action="store_true", help="write prompts by the model's chat template")
    parser.add_argument("--batch-size", metavar="N", type=int, default=16, help="sequences at a time (default: %(default)s)")
    parser.add_argument("--max-length", metavar="N", type=int, default=4096, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of few-shot examples and drawn texts (default: %(default)s)")
    parser.add_argument(
        "--bootstrap-iters", metavar="N", type=int, default=1000, help="for standard errors; 0: none (default: %(default)s)"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="where the results go as JSON, samples left out")
    arguments = parser.parse_args(argv)
    for name, least in (("batch_size", 1), ("max_length", 2), ("num_fewshot", 0), ("limit", 1), ("seed", 0), ("bootstrap_iters", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    for task in arguments.tasks:
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
            parser.error(f"there is no task file {task}")
    try:
        if arguments.output is not None:
            check_output_file(arguments.output)
    except ValueError as error:
        parser.error(str(error))
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        parser.error(f"evaluating needs {error.name}, which is not installed; pip install 'megatron-hybrid[evaluate]'")
    from megatron_hybrid.substrate.quiet import silence_known_warnings

    silence_known_warnings()
    from megatron_hybrid.substrate.launch import run_on_ranks

    try:
        run = load_requested_run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run_on_ranks(partial(_evaluate, arguments), run)


def _evaluate(arguments: argparse.Namespace, run: RunConfig, substrate: Substrate) -> ExitCode:
    """On the first rank look at the tasks; load the model; on the first rank run the tasks and report."""
    leave_at_once_on(signal.SIGINT)
    from megatron_hybrid.evaluate.tasks import load_tasks
    from megatron_hybrid.generate.load import load_language_model
    from megatron_hybrid.generate.session import lead
    from megatron_hybrid.substrate import ExitCode

    # Before the weights, which take longer.
    tasks = load_tasks(arguments.tasks) if substrate.rank == 0 else None
    language_model = load_language_model(run, arguments.model, substrate, step=arguments.checkpoint)
    use = partial(_run_tasks, arguments, tasks)
    lead(language_model, substrate, use, max_batch_size=arguments.batch_size, max_length=arguments.max_length)
    return ExitCode.FINISHED


def _run_tasks(arguments: argparse.Namespace, tasks: Tasks, session: Session) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    from megatron_hybrid.evaluate.harness import HarnessModel

    results: dict[str, Any] | None = simple_evaluate(
        model=HarnessModel(session, seed=arguments.seed),
        tasks=tasks.items,
        task_manager=tasks.manager,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        bootstrap_iters=arguments.bootstrap_iters,
        apply_chat_template=arguments.chat,
        random_seed=arguments.seed,
        fewshot_random_seed=arguments.seed,
        log_samples=False,
    )
    assert results is not None
    print(make_table(results))
    if arguments.output is not None:
        arguments.output.write_text(
            json.dumps({name: results[name] for name in ("results", "versions", "n-shot")}, indent=2, default=str) + "\n"
        )
