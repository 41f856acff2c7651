"""A compression end to end on the device at hand, over several seeds: text, parent, every stage, one table.

    python -m benchmarks.minipuzzle_end_to_end                          # examples/minipuzzle/gpu*.yaml: minutes on one H100
    python -m benchmarks.minipuzzle_end_to_end --seeds 5 --jobs 2       # five seeds, two at a time on the device
    python -m benchmarks.minipuzzle_end_to_end --option distill.long_tokens=8M --parent-option train.steps=2000

The text is Python: the standard library of the interpreter that runs this, and the packages installed beside it, as far as --text-mb goes.
Text, parent and every stage are kept under runs/minipuzzle, and what is there is not made again: the same command goes on after a stop.
Seeds share the device while they score, search, prune and train; decoding is timed afterwards, one at a time.
Prints the table of docs/cards/minipuzzle.md and writes comparison.png and comparison.html.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.python_text import prepare_text
from examples.quickstart.demo import ROOT, environment, run
from megatron_hybrid.config import load_config
from tools.minipuzzle.config import load_minipuzzle

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
    parser.add_argument("--seeds", type=int, default=3, help="compressions, with seeds 1, 2, ... (default: 3)")
    parser.add_argument("--jobs", type=int, default=3, help="compressions that share the device at a time (default: 3)")
    parser.add_argument("--text-mb", type=float, default=128.0, help="Python text to learn from, in MB (default: 128)")
    arguments = parser.parse_args(argv)
    started_s = time.monotonic()
    parent_run = load_config(arguments.parent, arguments.parent_option)
    work_dir = load_minipuzzle(arguments.compression, arguments.option).work_dir
    work_dirs = [work_dir.with_name(f"{work_dir.name}-{seed}") for seed in range(1, arguments.seeds + 1)]
    code = prepare_text(parent_run, arguments.text_mb) or run("megatron_hybrid", "pretrain", arguments.parent, *arguments.parent_option)
    if code:
        return code
    plans = [
        [arguments.compression, *arguments.option, f"parent={parent_run.run_dir}", f"seed={seed}", f"work_dir={work_dir}"]
        for seed, work_dir in enumerate(work_dirs, start=1)
    ]
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    together = [[*plan, f"runtime.threads_per_rank={threads}", "--until", "distill"] for plan in plans]
    code = run_together(together, work_dirs, arguments.jobs)
    for plan in plans:
        code = code or run("tools.minipuzzle", "run", *plan)
    if code:
        return code
    from tools.minipuzzle.comparison import compare, comparison_table, write_comparison

    comparison = compare(work_dirs)
    page = write_comparison(comparison, work_dir)
    print(f"\n{comparison_table(comparison)}\n\n{page}\n{time.monotonic() - started_s:.0f} s in this call", flush=True)
    return 0


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
