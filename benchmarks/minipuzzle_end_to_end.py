"""A compression end to end on the device at hand, over several seeds: text, parent, every stage, one table.

    python -m benchmarks.minipuzzle_end_to_end                          # examples/minipuzzle/gpu*.yaml: minutes on one H100
    python -m benchmarks.minipuzzle_end_to_end --seeds 5 --jobs 2       # five seeds, two at a time on the device
    python -m benchmarks.minipuzzle_end_to_end --option distill.long_tokens=8M --parent-option train.steps=2000
    python -m benchmarks.minipuzzle_end_to_end --finetune-rates 3e-5 1e-4 2e-4      # a tuned baseline: the best rate of seed 1 for all

The text is Python: the standard library of the interpreter that runs this, and the packages installed beside it, as far as --text-mb goes.
Text, parent and every stage are kept under runs/minipuzzle, and what is there is not made again: the same command goes on after a stop.
Seeds share the device while they score, search, prune and train; decoding is timed afterwards, one at a time.
Prints the table of docs/cards/minipuzzle.md and writes comparison.png and comparison.html.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.python_text import prepare_text
from examples.quickstart.demo import ROOT, environment, run
from megatron_hybrid.config import load_config
from tools.minipuzzle.config import load_minipuzzle
from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.results import Results, load_results

_POLL_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is left; returns the exit code of the first step that fails."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.minipuzzle_end_to_end", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parent", default="examples/minipuzzle/gpu_parent.yaml", help="run that trains the parent")
    parser.add_argument("--compression", default="examples/minipuzzle/gpu.yaml", help="compression of it")
    parser.add_argument("--parent-option", action="append", default=[], metavar="KEY=VALUE", help="option of the parent's run")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="option of every compression")
    parser.add_argument(
        "--finetune-rates",
        nargs="+",
        type=float,
        default=[],
        metavar="RATE",
        help="learning rates for the fine-tuned baseline: tried on the first seed, and the one with the least loss on held-out text is "
        "every seed's (default: the YAML's baselines.finetune_optimizer)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="compressions, with seeds 1, 2, ... (default: 3)")
    parser.add_argument("--jobs", type=int, default=3, help="compressions that share the device at a time (default: 3)")
    parser.add_argument("--text-mb", type=float, default=128.0, help="Python text to learn from, in MB (default: 128)")
    arguments = parser.parse_args(argv)
    for name in ("seeds", "jobs", "text_mb"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(arguments, name):g}")
    if any(rate <= 0 for rate in arguments.finetune_rates):
        parser.error(f"--finetune-rates must be above 0, got {arguments.finetune_rates}")
    started_s = time.monotonic()
    parent_run = load_config(arguments.parent, arguments.parent_option)
    work_dir = load_minipuzzle(arguments.compression, arguments.option).work_dir
    work_dirs = [work_dir.with_name(f"{work_dir.name}-{seed}") for seed in range(1, arguments.seeds + 1)]
    (corpus,) = parent_run.data.sources.values()
    code = prepare_text(parent_run.data.tokenizer.path, corpus, parent_run.model.vocab_size, arguments.text_mb)
    code = code or run("megatron_hybrid", "pretrain", arguments.parent, *arguments.parent_option)
    if code:
        return code
    plans = [
        [arguments.compression, *arguments.option, f"parent={parent_run.run_dir}", f"seed={seed}", f"work_dir={work_dir}"]
        for seed, work_dir in enumerate(work_dirs, start=1)
    ]
    shared = [f"runtime.threads_per_rank={max(1, (os.cpu_count() or 1) // arguments.jobs)}", "--until", "distill"]
    if arguments.finetune_rates:
        # First what the baselines begin from; then the rates, each in a copy of the first seed's files.
        bare = [[*plan, "baselines.finetune=false", "baselines.scratch=false", *shared] for plan in plans]
        code = run_together(bare, work_dirs, arguments.jobs)
        tried = {rate: copy_for_rate(work_dirs[0], rate) for rate in arguments.finetune_rates} if not code else {}
        trials = [
            [*plans[0], f"work_dir={copy}", finetune_rate(rate), "baselines.finetune=true", "baselines.scratch=false", *shared]
            for rate, copy in tried.items()
        ]
        code = code or run_together(trials, list(tried.values()), arguments.jobs)
        if code:
            return code
        best = best_rate({rate: load_results(WorkFiles(copy)) for rate, copy in tried.items()})
        plans = [[*plan, finetune_rate(best)] for plan in plans]
        keep_trial(tried[best], work_dirs[0])
    code = run_together([[*plan, *shared] for plan in plans], work_dirs, arguments.jobs)
    for plan in plans:
        code = code or run("tools.minipuzzle", "run", *plan)
    if code:
        return code
    from tools.minipuzzle.comparison import compare, comparison_table, write_comparison

    comparison = compare(work_dirs)
    page = write_comparison(comparison, work_dir)
    print(f"\n{comparison_table(comparison)}\n\n{page}\n{time.monotonic() - started_s:.0f} s in this call", flush=True)
    return 0


def finetune_rate(rate: float) -> str:
    """The option for a rate of the fine-tuned baseline, which falls to a hundredth as that of distillation does."""
    return f"baselines.finetune_optimizer={{lr: {rate!r}, min_lr: {rate / 100!r}}}"


def copy_for_rate(work_dir: Path, rate: float) -> Path:
    """Make a compression with what another one's baselines begin from, linked where it is large; return its folder. One there is kept."""
    copy = work_dir.with_name(f"{work_dir.name}-finetune-{rate:g}")
    if copy.exists():
        return copy
    partial = copy.with_name(copy.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for file in work_dir.iterdir():
        if file.is_file() and file.name != "run.log":
            shutil.copy2(file, partial)
    for name in ("pruned", "short", "long"):
        shutil.copytree(work_dir / name, partial / name, copy_function=os.link)
    partial.rename(copy)
    return copy


def keep_trial(trial: Path, work_dir: Path) -> None:
    """Link the trainings of the rate that won to where the compression that it was copied from has its own, unless some are there."""
    if not (work_dir / "finetune").exists():
        partial = work_dir / "finetune.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(trial / "finetune", partial, copy_function=os.link)
        partial.rename(work_dir / "finetune")


def best_rate(tried: Mapping[float, Results]) -> float:
    """Print what the fine-tuned baseline came to at each rate, and return the rate with the least loss."""
    losses = {rate: each.find("finetune", each.winner).loss for rate, each in tried.items()}
    best = min(losses, key=losses.__getitem__)
    print("\nfine-tuned without a teacher, by learning rate:")
    for rate, loss in losses.items():
        print(f"  {rate:8.2e}  loss {loss:.4f}{'  <- for every seed' if rate == best else ''}")
    if len(losses) > 1 and best in (min(losses), max(losses)):
        print("  the best is at the end of the list: try rates beyond it, in another work_dir (--option work_dir=...)")
    return best


def run_together(plans: Sequence[list[str]], work_dirs: Sequence[Path], jobs: int) -> int:
    """Run compressions, some at a time, each with its output in WORK_DIR/run.log; return the first exit code that is not 0."""
    waiting = list(zip(plans, work_dirs, strict=True))
    running: list[tuple[subprocess.Popen, Path]] = []
    code = 0
    started_s = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                plan, work_dir = waiting.pop(0)
                running.append((start(plan, work_dir), work_dir))
            time.sleep(_POLL_S)
            still = [process.poll() is None for process, _ in running]
            for (process, work_dir), goes_on in zip(running, still, strict=True):
                state = "" if goes_on else f"ended with {process.returncode}: "
                print(f"{time.monotonic() - started_s:5.0f} s  {work_dir.name}: {state}{last_line(work_dir / 'run.log')}", flush=True)
                # of a process that a signal ended, what a shell makes of it
                ended = process.returncode or 0
                code = code or (128 - ended if ended < 0 else ended)
            running = [each for each, goes_on in zip(running, still, strict=True) if goes_on]
            if code:
                break
    finally:
        # Stopped or failed here, the others save and leave.
        for process, _ in running:
            process.terminate()
        for process, _ in running:
            process.wait()
    return code


def start(plan: list[str], work_dir: Path) -> subprocess.Popen:
    """Start one compression."""
    work_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tools.minipuzzle", "run", *plan]
    print(f"\n$ python {' '.join(command[1:])} > {work_dir / 'run.log'}", flush=True)
    with (work_dir / "run.log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT)


def last_line(file: Path) -> str:
    """What a log says at present; progress bars write over their line."""
    lines = file.read_text(errors="replace").replace("\r", "\n").split("\n") if file.exists() else []
    return next((line[:140] for line in reversed(lines) if line.strip()), "")


if __name__ == "__main__":
    sys.exit(main())
