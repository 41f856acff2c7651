"""Stage 2: the grid, the exact optimum, and, where the parent has weights, the order on validation tokens. Leaves ``candidates.json``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from tqdm import tqdm

from megatron_hybrid.config import ModelConfig, RunConfig
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.substrate.launch import run_on_ranks
from megatron_hybrid.substrate.place import place_from_environment
from tools.minipuzzle.candidate import Candidate
from tools.minipuzzle.config import MiniPuzzleConfig
from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.held_out import HeldOut
from tools.minipuzzle.inputs import Inputs, differences, latency_inputs, require_same, scoring_inputs, search_inputs
from tools.minipuzzle.latency import load_latency, save_latency
from tools.minipuzzle.memory import model_memory
from tools.minipuzzle.parent import Parent, find_parent
from tools.minipuzzle.scores import SYNTHETIC, Scores, load_scores, read_json, require_same_checkpoint, synthetic_scores, write_json
from tools.minipuzzle.search import Estimate, damage_of, ffn_choices, search_grid, width_choices
from tools.minipuzzle.solver import Solution, solve

_SHOWN = 12
_Measured = TypeVar("_Measured")


@dataclass(frozen=True)
class Listed:
    """One line of ``candidates.json``."""

    candidate: Candidate
    damage: float
    memory_gib: float
    latency_ms: float | None = None
    is_exact: bool = False
    """Whether the integer program found it, instead of the grid."""
    is_proven: bool = True
    """Of the integer program's: whether nothing better is left, instead of that its time was up."""
    loss: float | None = None
    accuracy: float | None = None
    agreement: float | None = None
    chosen: bool = False
    """Whether it is pruned and distilled."""

    @classmethod
    def of(cls, estimate: Estimate, *, is_exact: bool = False, is_proven: bool = True) -> Listed:
        """From what arithmetic says."""
        return cls(estimate.candidate, estimate.damage, estimate.memory_gib, estimate.latency_ms, is_exact, is_proven)


def search(config: MiniPuzzleConfig) -> int:
    """Run the stage; return the exit code.

    Raises:
        ValueError: nothing fits, or the scores are not of this parent.
    """
    files, parent = WorkFiles(config.work_dir), find_parent(config)
    scores = scores_for(parent, files)
    latency = None
    if config.search.latency.limit_ms is not None:
        if not holds_times(files, parent):
            code = run_on_ranks(LatencyEntry(config), parent.timing_run(config.work_dir))
            if code or place_from_environment(os.environ).launcher != "plain":
                # Ranks that a launcher started meet once; the next start finds the times.
                return code
        latency = load_latency(files.latency)
    start_s = time.perf_counter()
    grid = search_grid(parent.model, scores, config.search, latency)
    elapsed_s = time.perf_counter() - start_s
    listed = [Listed.of(estimate) for estimate in grid]
    solution = solve(parent.model, scores, config.search, latency) if config.search.solver else None
    if solution is not None and solution.estimate is not None:
        listed.append(Listed.of(solution.estimate, is_exact=True, is_proven=solution.is_proven))
    _print_search(config, parent, scores, listed, elapsed_s)
    if solution is not None:
        print(describe_solution(solution, grid[0].damage, config.search.solver_time_limit_s), flush=True)
    if parent.checkpoint is None:
        save_candidates(listed, search_inputs(parent, scores), files)
        return ExitCode.FINISHED
    to_run = [*listed[: config.search.num_evaluated], *(each for each in listed[config.search.num_evaluated :] if each.is_exact)]
    for each in to_run:
        # Before any work: whether the layout divides what is left.
        parent.build_run(config.work_dir, each.candidate.model(parent.model), 1, optimizer={"lr": 1e-5})
    return run_on_ranks(RankEntry(config, tuple(to_run), tuple(listed)), parent.forward_run(config.work_dir))


def scores_for(parent: Parent, files: WorkFiles) -> Scores:
    """Return the scores of a parent: from the score stage, or made up for a preset that has none.

    Raises:
        ValueError: there are none, or they are of other weights, another model or other options.
    """
    if parent.checkpoint is None and not files.scores.exists():
        return synthetic_scores(parent.model, parent.config.seed)
    scores = load_scores(files.scores)
    if parent.checkpoint is not None:
        require_same_checkpoint(scores, parent.digest, files.scores)
        require_same(scores.made_from, scoring_inputs(parent), files.scores, "Score again, or go back to what they were made from")
    elif scores.model != parent.model.architecture():
        raise ValueError(f"{files.scores} scores another model than {parent.config.parent}; remove it, or choose another work_dir")
    return scores


def save_candidates(listed: list[Listed], made_from: Inputs, files: WorkFiles) -> None:
    """Write the stage's file."""
    lines = [{"name": each.candidate.name} | asdict(each) | {"candidate": each.candidate.to_json()} for each in listed]
    write_json(files.candidates, {"made_from": made_from, "candidates": lines})


def load_candidates(parent: Parent) -> list[Listed]:
    """Read the stage's file, edited or not.

    Raises:
        ValueError: it is missing or was made from other scores or options than the present ones, or a line in it is no candidate.
    """
    files = WorkFiles(parent.config.work_dir)
    scores, content = scores_for(parent, files), read_candidates(files)
    require_same(
        content.get("made_from", {}), search_inputs(parent, scores), files.candidates, "Search again, or go back to what it was made from"
    )
    return [
        parse_candidate(line, parent, scores, f"{files.candidates}, candidate {number}")
        for number, line in enumerate(content["candidates"])
    ]


def find_candidate(listed: Iterable[Listed], name: str | None) -> Candidate | None:
    """Return the candidate of this name, or None where none has it."""
    return next((each.candidate for each in listed if each.candidate.name == name), None)


def read_candidates(files: WorkFiles) -> dict[str, Any]:
    """Return the stage's file as it is: ``candidates``, one mapping each, and ``made_from``.

    Raises:
        ValueError: it is missing, or something else is in it.
    """
    content = read_json(files.candidates, "run the search stage first")
    if not isinstance(content.get("candidates"), list):
        raise ValueError(f"{files.candidates} must have a list of candidates; search again")
    for number, line in enumerate(content["candidates"]):
        if not isinstance(line, dict) or "candidate" not in line:
            raise ValueError(f"{files.candidates}, candidate {number}: expected a mapping with candidate, and chosen: true if it is pruned")
    return content


def parse_candidate(line: dict[str, Any], parent: Parent, scores: Scores, source: str) -> Listed:
    """Return a line of the file. One that a person added need not say more than ``candidate``, and ``chosen`` where it is to be pruned.

    Figures belong to the candidate that has the line's name. Where it has another, or none, what arithmetic can say is computed, and
    what would have to be measured left open.

    Raises:
        ValueError: it is not made of the parent's parts, or has a key that no line has, or a value of another kind.
    """
    known = ["name", *(field.name for field in fields(Listed))]
    unknown = sorted(set(line) - set(known))
    if unknown:
        raise ValueError(f"{source}: unknown key {', '.join(unknown)}; a line may have {', '.join(known)}")
    candidate = Candidate.from_json(line["candidate"], parent.model, source)
    chosen = line.get("chosen", False)
    if not isinstance(chosen, bool):
        raise ValueError(f"{source}: chosen must be true or false, got {chosen!r}")
    if line.get("name") != candidate.name:
        memory_gib = model_memory(candidate.model(parent.model), parent.config.search.memory).total_gib
        return Listed(candidate, damage_of(scores, candidate), memory_gib, chosen=chosen)
    marks = {name: line[name] is True for name in ("is_exact", "is_proven") if name in line}
    figures = {name: value for name, value in line.items() if name not in ("name", "candidate", "chosen", *marks)}
    wrong = [
        name for name, value in figures.items() if value is not None and (isinstance(value, bool) or not isinstance(value, int | float))
    ]
    missing = [name for name in ("damage", "memory_gib") if figures.get(name) is None]
    if wrong or missing:
        raise ValueError(f"{source}: {wrong or missing} must be numbers; give them, or drop the line's name to have them computed")
    return Listed(candidate, **marks, chosen=chosen, **figures)


def holds_times(files: WorkFiles, parent: Parent) -> bool:
    """Whether there are times of layers, measured on this device and in the setting that is asked for."""
    return files.latency.exists() and not differences(load_latency(files.latency).made_from, latency_inputs(parent))


@dataclass(frozen=True)
class LatencyEntry:
    """Measures layers on each rank, and writes the times on rank 0."""

    config: MiniPuzzleConfig

    def __call__(self, run: RunConfig, substrate: Substrate) -> ExitCode:
        """Measure."""
        from tools.minipuzzle.timing import measure_latency

        search_options = self.config.search
        widths, ffn = list(width_choices(run.model, search_options)), ffn_choices(run.model, search_options)
        model = measure_latency(run, substrate, search_options.latency, widths, ffn)
        if substrate.rank == 0:
            save_latency(replace(model, made_from=latency_inputs(find_parent(self.config))), WorkFiles(self.config.work_dir).latency)
        return ExitCode.FINISHED


@dataclass(frozen=True)
class RankEntry:
    """Runs candidates on validation tokens on each rank, and writes the file on rank 0."""

    config: MiniPuzzleConfig
    to_run: tuple[Listed, ...]
    listed: tuple[Listed, ...]

    def __call__(self, run: RunConfig, substrate: Substrate) -> ExitCode:
        """Rank."""
        parent = find_parent(self.config)
        files = WorkFiles(self.config.work_dir)
        scores = scores_for(parent, files)
        ranked = rank_candidates(run, substrate, parent, scores, list(self.to_run))
        if substrate.rank == 0:
            rest = [each for each in self.listed if each.candidate not in {one.candidate for one in ranked}]
            save_candidates([*ranked, *rest], search_inputs(parent, scores), files)
            print(_table(parent.model, ranked[:_SHOWN]), flush=True)
        return ExitCode.FINISHED


def rank_candidates(run: RunConfig, substrate: Substrate, parent: Parent, scores: Scores, candidates: list[Listed]) -> list[Listed]:
    """Return the candidates by what they are worth on validation tokens, the best ``top_k`` chosen; collective.

    Raises:
        ValueError: the checkpoint or the validation text cannot be used.
    """
    from megatron_hybrid.convert.native import NativeSource
    from megatron_hybrid.substrate.transformer_config import build_transformer_config
    from megatron_hybrid.tasks.frozen import load_frozen_chunks
    from tools.minipuzzle.evaluate import Predictions, measure_quality
    from tools.minipuzzle.forward import StageForward
    from tools.minipuzzle.pruning import select_parts

    options = parent.config.search
    config = build_transformer_config(run, substrate)
    (chunk,) = load_frozen_chunks(run, parent.weights, config, substrate)
    stage, source = StageForward(chunk, run, substrate), NativeSource(parent.weights)
    batches = HeldOut(run, substrate, options.num_tokens)
    parent_says: Predictions = {}
    measure_quality(stage, batches, batches.num_samples, keep=parent_says)
    ranked = []
    for each in tqdm(candidates, desc="rank candidates", disable=substrate.rank != 0, file=sys.stdout):
        selection = select_parts(parent.model, each.candidate, scores)
        if each.candidate.keeps_widths(parent.model):
            quality = measure_quality(stage, batches, batches.num_samples, parent_says=parent_says, selection=selection)
        else:
            child = _cut_child(parent, each.candidate, source, selection, substrate)
            quality = measure_quality(child, batches, batches.num_samples, parent_says=parent_says)
        ranked.append(replace(each, **asdict(quality)))
    return [replace(each, chosen=place < options.top_k) for place, each in enumerate(best_first(ranked, options.rank_by))]


def quality_key(measured: Any, rank_by: str) -> float:
    """Return what a model is ranked by, higher is better; ``measured`` has loss, accuracy and agreement.

    >>> from types import SimpleNamespace
    >>> quality_key(SimpleNamespace(loss=2.0, accuracy=0.5, agreement=0.75), "accuracy_and_agreement")
    0.625
    """
    if rank_by == "accuracy_and_agreement":
        return (measured.accuracy + measured.agreement) / 2
    return -measured.loss if rank_by == "loss" else getattr(measured, rank_by)


def best_first(measured: Iterable[_Measured], rank_by: str) -> list[_Measured]:
    """Return models by what they are ranked by; of equals, the lower loss first."""
    return sorted(measured, key=lambda each: (-quality_key(each, rank_by), each.loss))


def _cut_child(parent: Parent, candidate: Candidate, source: Any, selection: Any, substrate: Substrate) -> Any:
    """A candidate's own model in this layout, with weights cut from the parent's checkpoint on the way."""
    from megatron_hybrid.layers.specs import ops_for
    from megatron_hybrid.layout.stages import plan_stages
    from megatron_hybrid.model.hybrid import HybridModel
    from megatron_hybrid.substrate.transformer_config import build_transformer_config
    from tools.minipuzzle.evaluate import load_cut
    from tools.minipuzzle.forward import StageForward
    from tools.minipuzzle.prune import PrunedSource

    run = parent.forward_run(parent.config.work_dir, candidate.model(parent.model))
    stages, config = plan_stages(run.model, run.parallel, run.data.sequence_length), build_transformer_config(run, substrate)
    chunk = HybridModel(
        run.model,
        config,
        ops_for(substrate.device, config.params_dtype, choices=run.kernels, chunk_length=run.model.mamba_chunk_size),
        layer_range=stages[substrate.pipeline_rank],
        is_first_stage=substrate.pipeline_rank == 0,
        is_last_stage=substrate.pipeline_rank == len(stages) - 1,
    )
    chunk.to(substrate.device).eval()
    load_cut(chunk, PrunedSource(source, candidate, selection), substrate)
    return StageForward(chunk, run, substrate)


def _print_search(config: MiniPuzzleConfig, parent: Parent, scores: Scores, listed: list[Listed], elapsed_s: float) -> None:
    grid, exact = [each for each in listed if not each.is_exact], [each for each in listed if each.is_exact]
    if scores.checkpoint == SYNTHETIC:
        print("no weights, no scores: the importance is made up; counts, patterns and memory are not")
    print(f"the parent takes {model_memory(parent.model, config.search.memory).describe()}")
    print(f"{len(grid)} candidates of the grid fit, found in {elapsed_s:.1f} s; the least estimated damage first:")
    print(_table(parent.model, [*grid[:_SHOWN], *exact]))
    sys.stdout.flush()


def describe_solution(solution: Solution, grid_damage: float, time_limit_s: float) -> str:
    """What the integer program says beside the grid's best, in one sentence.

    >>> describe_solution(Solution(None, False, 0.1), 0.2, 60.0)
    'exact solver: no candidate within 60 s (search.solver_time_limit_s), so that nothing is known of the optimum; give it more time'
    """
    if solution.estimate is None and solution.is_proven:
        return "exact solver: no candidate fits the limits"
    in_time = f"within {time_limit_s:g} s (search.solver_time_limit_s)"
    if solution.estimate is None:
        return f"exact solver: no candidate {in_time}, so that nothing is known of the optimum; give it more time"
    beside = ""
    if grid_damage > 0:
        less = 1 - solution.estimate.damage / grid_damage
        beside = (
            f" has {less:.1%} less estimated damage than the grid's best" if less >= 0 else f" is {-less:.1%} worse than the grid's best"
        )
    if solution.is_proven:
        return f"the exact optimum{beside}" if beside else "the exact optimum was found"
    least = max(solution.least_damage, 0.0)
    return (
        f"the best of the exact solver {in_time}{beside}; it is not proven to be the optimum, whose damage is at least {least:.4f} "
        f"(this one: {solution.estimate.damage:.4f})"
    )


def _table(parent: ModelConfig, listed: list[Listed]) -> str:
    has_quality = any(each.loss is not None for each in listed)
    head = f"{'':9}{'damage':>9} {'GiB':>8} {'ms':>8}" + (f" {'loss':>8} {'accuracy':>9} {'agrees':>7}" if has_quality else "")
    lines = [head]
    for each in listed:
        mark = (("exact" if each.is_proven else "solver") if each.is_exact else "grid") + (" *" if each.chosen else "")
        latency = "" if each.latency_ms is None else f"{each.latency_ms:.3f}"
        line = f"{mark:9}{each.damage:9.4f} {each.memory_gib:8.4f} {latency:>8}"
        if each.loss is not None:
            line += f" {each.loss:8.4f} {each.accuracy:9.2%} {each.agreement:7.2%}"
        lines.append(f"{line}  {each.candidate.describe(parent)}  {each.candidate.pattern(parent)}")
    return "\n".join(lines)
