"""All stages, one after another, and each only as far as it is not done: started again, a plan goes on where it was stopped.

    score -> search -> prune the chosen -> distil each for a short while -> distil the best for long, and the baselines -> report

A stage is done when its file is there and was made from the present inputs (``inputs.py``); what a person edited in it is kept, and a
training that was made from others is refused. ``until`` ends a plan after an earlier stage, so that several plans can share a device and
leave the timing of decoding, which wants it alone, for later.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megatron_hybrid.config.run_directory import CHECKPOINTS_NAME
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.substrate.place import place_from_environment
from tools.minipuzzle.config import MiniPuzzleConfig, Stage
from tools.minipuzzle.distill import Kind, check_trainings, planned_kinds, train_candidate, training_run
from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.inputs import Inputs, differences, scoring_inputs, search_inputs
from tools.minipuzzle.parent import Parent, find_parent
from tools.minipuzzle.rank import Listed, best_first, find_candidate, load_candidates, quality_key, read_candidates, scores_for, search
from tools.minipuzzle.results import choose_winner, current_results, measure_results, measure_speed, save_results, to_subject
from tools.minipuzzle.score import score
from tools.minipuzzle.scores import read_json


def run(config: MiniPuzzleConfig, until: Stage = "report") -> int:
    """Run what is left of the plan up to a stage, that included; return the exit code of the stage that ended it.

    Raises:
        ValueError: something does not fit; nothing was lost.
    """
    if is_launched():
        raise ValueError(
            "run starts the ranks of its stages itself; under torchrun or srun call score, search and distill (prune and report need no "
            "ranks), each again until it has nothing left to do"
        )
    parent = find_parent(config)
    # Said first: a preset is asked for nothing else.
    _ = parent.weights
    if until in ("distill", "report"):
        files = WorkFiles(config.work_dir)
        lines = read_candidates(files)["candidates"] if files.candidates.exists() else []
        check_trainings(parent, [line["name"] for line in lines if line.get("chosen") and "name" in line])
    return next((code for code in _stages(parent, until) if code), ExitCode.FINISHED)


def distill(config: MiniPuzzleConfig) -> int:
    """Run what is left of the distillation stage; return the exit code.

    Ranks that torchrun or srun started meet once: there, one training or measurement is done, and the same command does the next.

    Raises:
        ValueError: something does not fit; nothing was lost.
    """
    for code in distill_all(find_parent(config)):
        if code:
            return code
        if is_launched() and code is not None:
            print("done; start again for what comes next", flush=True)
            return ExitCode.FINISHED
    return ExitCode.FINISHED


def report(config: MiniPuzzleConfig) -> int:
    """Run the report stage: time decoding where that is to do, and write the page; return the exit code.

    Raises:
        ValueError: there are no candidates yet, or something does not fit.
    """
    require_no_ranks("report")
    return next((code for code in _report(find_parent(config)) if code), ExitCode.FINISHED)


def prune(config: MiniPuzzleConfig) -> int:
    """Run the prune stage; return the exit code.

    Raises:
        ValueError: none is chosen, or something does not fit.
    """
    require_no_ranks("prune")
    prune_chosen(find_parent(config))
    return ExitCode.FINISHED


def require_no_ranks(verb: str) -> None:
    """Refuse ranks for a stage that one process does: several would write the same files.

    Raises:
        ValueError: torchrun or srun started this process.
    """
    if is_launched():
        raise ValueError(
            f"{verb} is the work of one process, and torchrun or srun would have every rank do it; call it without: "
            f"python -m tools.minipuzzle {verb} CONFIG"
        )


def is_launched() -> bool:
    """Whether torchrun or srun started this process as one of several ranks."""
    return place_from_environment(os.environ).launcher != "plain"


def prune_chosen(parent: Parent) -> list[Listed]:
    """Prune every chosen candidate that is not pruned yet, and return the chosen ones.

    Raises:
        ValueError: none is chosen, or the scores are not of this parent.
    """
    from megatron_hybrid.convert.native import NativeSource
    from megatron_hybrid.convert.target import Layout
    from tools.minipuzzle.prune import prune as prune_one

    files = WorkFiles(parent.config.work_dir)
    chosen = chosen_candidates(parent)
    scores = scores_for(parent, files)
    layout = Layout(parent.config.parallel.tensor, parent.config.parallel.pipeline)
    for each in chosen:
        prune_one(NativeSource(parent.weights), each.candidate, scores, files.pruned(each.candidate.name), layout)
    return chosen


def chosen_candidates(parent: Parent) -> list[Listed]:
    """Return the candidates that are to be pruned.

    Raises:
        ValueError: there are none.
    """
    files = WorkFiles(parent.config.work_dir)
    chosen = [each for each in load_candidates(parent) if each.chosen]
    if not chosen:
        raise ValueError(f"{files.candidates} has no candidate with chosen: true; set it for those that shall be pruned")
    return chosen


def distill_all(parent: Parent) -> Iterator[int | None]:
    """Short runs, the choice of the winner, its long run and the baselines; yield each one's exit code, None where it was done already."""
    files, chosen = WorkFiles(parent.config.work_dir), chosen_candidates(parent)
    for number, each in enumerate(chosen, start=1):
        yield _train(parent, each, "short", f"short distillation {number} of {len(chosen)}")
    yield _measure(parent, chosen, ["short"])
    results = current_results(parent)
    rank_by, shorts = parent.config.search.rank_by, [results.find("short", each.candidate.name) for each in chosen]
    quality = {each.name: quality_key(each, rank_by) for each in best_first(shorts, rank_by)}
    results.winner = choose_winner(results, quality)
    results.winner_from = quality
    if place_from_environment(os.environ).rank == 0:
        save_results(results, files)
    winner = next(each for each in chosen if each.candidate.name == results.winner)
    kinds = [kind for kind in planned_kinds(parent) if kind != "short"]
    for kind in kinds:
        yield _train(parent, winner, kind, kind)
    yield _measure(parent, [winner], kinds)


def _stages(parent: Parent, until: Stage) -> Iterator[int | None]:
    config, files = parent.config, WorkFiles(parent.config.work_dir)
    if _is_to_do("score", files.scores, scoring_inputs(parent)):
        yield score(config)
    if until == "score":
        return
    if _is_to_do("search", files.candidates, search_inputs(parent, scores_for(parent, files))):
        yield search(config)
    if until == "search":
        return
    print("\nprune", flush=True)
    chosen = prune_chosen(parent)
    yield _measure(parent, chosen, [])
    if until == "prune":
        return
    yield from distill_all(parent)
    if until == "distill":
        return
    yield from _report(parent)


def _report(parent: Parent) -> Iterator[int | None]:
    """The page; once the winner is trained, decoding of it and of its parent is timed first."""
    from tools.minipuzzle.report import write_report

    results = current_results(parent)
    is_trained = results.winner is not None and results.find("long", results.winner) is not None
    if is_trained and not results.speeds and (winner := find_candidate(load_candidates(parent), results.winner)) is not None:
        # A model that does not fit one rank cannot be timed, and has its page all the same.
        write_report(parent)
        print("time decoding of parent and child on one rank of this device", flush=True)
        yield measure_speed(parent, winner)
    print("\n" + "\n".join(write_report(parent)), flush=True)


def _is_to_do(stage: Stage, file: Path, inputs: Inputs) -> bool:
    """Whether a stage's file is missing or was made from other inputs; says so."""
    if not file.exists():
        print(f"\n{stage}", flush=True)
        return True
    changed = differences(read_json(file, "remove it and run again").get("made_from", {}), inputs)
    if changed:
        print(f"\n{stage} again: {'; '.join(changed)}", flush=True)
    return bool(changed)


def _train(parent: Parent, each: Listed, kind: Kind, title: str) -> int | None:
    """One training, unless its last checkpoint is there: a finished run need not start ranks to find out."""
    from megatron_hybrid.checkpoint.store import complete_steps

    run_of = training_run(parent, each.candidate, kind)
    if run_of.train.steps in complete_steps(run_of.run_dir / CHECKPOINTS_NAME):
        return None
    print(f"\n{title}: {each.candidate.name}, {run_of.total_tokens:,} tokens", flush=True)
    return train_candidate(parent, each.candidate, kind)


def _measure(parent: Parent, listed: list[Listed], kinds: list[Kind]) -> int | None:
    """Pruned models, or trainings of them, on held-out text."""
    files, subjects = WorkFiles(parent.config.work_dir), []
    for each in listed:
        subjects.append(to_subject(parent, "pruned", each.candidate, files.pruned(each.candidate.name)))
        subjects += [to_subject(parent, kind, each.candidate, files.run_dir(kind, each.candidate.name)) for kind in kinds]
    return measure_results(parent, subjects)
