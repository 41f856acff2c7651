"""What every model of a compression came to on held-out text, and how fast and large parent and child are. Leaves ``results.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_hybrid.config import ModelConfig, ParallelConfig, RunConfig
from megatron_hybrid.layout.parameters import num_parameters
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.substrate.launch import run_on_ranks
from tools.minipuzzle.candidate import Candidate
from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.inputs import differences, evaluation_inputs, timing_inputs
from tools.minipuzzle.parent import Parent, weights_digest
from tools.minipuzzle.scores import read_json, write_json

LEAST_COST = 1e-4
"""Least nats per token that pruning must have cost for a share of it to mean anything: the last digit of the losses that are printed."""

ResultKind = Literal["parent", "pruned", "short", "long", "scratch", "finetune"]


@dataclass(frozen=True)
class Result:
    """One model on held-out text."""

    kind: ResultKind
    name: str
    """The candidate's; empty for the parent."""
    num_parameters: int
    tokens: int
    """Tokens it was trained on after pruning."""
    loss: float
    accuracy: float
    agreement: float | None
    weights: str = ""
    """Digest of the weights that were measured."""


@dataclass(frozen=True)
class Speed:
    """One model on this device, one rank, with a full cache."""

    kind: ResultKind
    device: str
    precision: str
    context_tokens: int
    batch_size: int
    decode_ms: float
    """Median time of a decoding step of all sequences."""
    memory_gib: float
    """Weights and caches in the precision they ran in."""
    peak_gib: float | None
    """Peak of the device's allocator while decoding; None on a CPU."""

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens per second."""
        return 1e3 * self.batch_size / self.decode_ms


@dataclass
class Results:
    """The stage's file."""

    models: list[Result] = field(default_factory=list)
    winner: str | None = None
    """Name of the candidate that was best after its short distillation."""
    speeds: list[Speed] = field(default_factory=list)
    measured_from: dict[str, Any] = field(default_factory=dict)
    """How ``models`` were measured (``inputs.evaluation_inputs``)."""
    winner_from: dict[str, float] = field(default_factory=dict)
    """What the winner was chosen by: candidate -> quality after the short distillation, higher is better."""
    timed_from: dict[str, Any] = field(default_factory=dict)
    """How ``speeds`` were measured (``inputs.timing_inputs``)."""

    def find(self, kind: ResultKind, name: str | None = None) -> Result | None:
        """Return a result, or None where it was not measured."""
        return next((each for each in self.models if each.kind == kind and name in (None, each.name)), None)

    def cost_of_pruning(self) -> float | None:
        """Return how much more loss the winner had as pruned than its parent; None where one is missing."""
        parent, pruned = self.find("parent"), self.find("pruned", self.winner)
        return None if self.winner is None or parent is None or pruned is None else pruned.loss - parent.loss

    def recovered(self, kind: ResultKind) -> float | None:
        """Return the share of the loss that pruning cost and a training of the winner won back.

        None where a part is missing, or where pruning cost nothing measurable (``LEAST_COST``): nothing was there to win back.

        >>> results = Results([Result(kind, "", 1, 0, loss, 0.0, None) for kind, loss in (("parent", 2.0), ("pruned", 4.0), ("long", 2.5))])
        >>> results.winner = ""
        >>> results.recovered("long")
        0.75
        """
        cost, trained = self.cost_of_pruning(), self.find(kind, self.winner)
        if cost is None or cost < LEAST_COST or trained is None:
            return None
        return (self.find("pruned", self.winner).loss - trained.loss) / cost


def load_results(files: WorkFiles) -> Results:
    """Read the file; empty where there is none yet.

    Raises:
        ValueError: it is damaged.
    """
    if not files.results.exists():
        return Results()
    content = read_json(files.results, "remove it and run again")
    try:
        models, speeds = [Result(**each) for each in content["models"]], [Speed(**each) for each in content["speeds"]]
        return Results(**content | {"models": models, "speeds": speeds})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{files.results} holds no results ({error}); remove it and run again") from None


def current_results(parent: Parent) -> Results:
    """Return what the file says of weights that are still there, measured as the options ask; the rest is as if it was not measured.

    Raises:
        ValueError: the file is damaged.
    """
    files = WorkFiles(parent.config.work_dir)
    results = load_results(files)
    if results.models and not differences(results.measured_from, evaluation_inputs(parent)):
        models = [each for each in results.models if each.weights == _weights_of(parent, each.kind, each.name)]
    else:
        models = []
    is_timed = results.winner is not None and not differences(results.timed_from, timing_inputs(parent, results.winner))
    return replace(results, models=models, speeds=results.speeds if is_timed else [])


def _weights_of(parent: Parent, kind: ResultKind, name: str) -> str | None:
    """Digest of the weights that a model has at present; None where there are none."""
    from megatron_hybrid.convert.native import NativeSource

    if kind == "parent":
        return parent.digest
    files = WorkFiles(parent.config.work_dir)
    directory = files.pruned(name) if kind == "pruned" else files.run_dir(kind, name)
    try:
        return weights_digest(NativeSource(directory))
    except ValueError:
        return None


def choose_winner(results: Results, quality: dict[str, float]) -> str:
    """Return the candidate that is trained for long: the best, or the one that the file names as long as it was chosen by these figures.

    Args:
        results: with the winner so far, which a person may have edited.
        quality: candidate -> what it is worth after the short distillation, higher is better.

    >>> choose_winner(Results(), {"a": 1.0, "b": 2.0})
    'b'
    >>> choose_winner(Results(winner="a", winner_from={"a": 1.0, "b": 2.0}), {"a": 1.0, "b": 2.0})
    'a'
    >>> choose_winner(Results(winner="a", winner_from={"a": 3.0, "b": 2.0}), {"a": 1.0, "b": 2.0})
    'b'

    Raises:
        ValueError: the file names none of them.
    """
    if results.winner is None or results.winner_from != quality:
        return max(quality, key=quality.__getitem__)
    if results.winner not in quality:
        raise ValueError(
            f"results.json: winner {results.winner} is none of the chosen candidates; name one of {', '.join(quality)}, or null"
        )
    return results.winner


def save_results(results: Results, files: WorkFiles) -> None:
    """Write the file."""
    write_json(files.results, asdict(results))


@dataclass(frozen=True)
class Subject:
    """A model to measure."""

    kind: ResultKind
    name: str
    model: ModelConfig
    checkpoint: Path
    num_parameters: int
    tokens: int
    weights: str


def measure_results(parent: Parent, subjects: list[Subject]) -> int | None:
    """Measure the models whose present weights are not in ``results.json``; return the exit code, None where all are."""
    known = {(each.kind, each.name, each.weights) for each in current_results(parent).models}
    new = tuple(each for each in subjects if (each.kind, each.name, each.weights) not in known)
    return run_on_ranks(ResultEntry(parent, new), parent.forward_run(parent.config.work_dir)) if new else None


@dataclass(frozen=True)
class ResultEntry:
    """Measures on each rank, and writes on rank 0."""

    parent: Parent
    subjects: tuple[Subject, ...]

    def __call__(self, run: RunConfig, substrate: Substrate) -> ExitCode:
        """Measure."""
        from megatron_hybrid.substrate.transformer_config import build_transformer_config
        from megatron_hybrid.tasks.frozen import load_frozen_chunks
        from tools.minipuzzle.evaluate import Predictions, measure_quality
        from tools.minipuzzle.forward import StageForward
        from tools.minipuzzle.rank import HeldOut

        def stage_of(its_run: RunConfig, checkpoint: Path) -> StageForward:
            (chunk,) = load_frozen_chunks(its_run, checkpoint, build_transformer_config(its_run, substrate), substrate)
            return StageForward(chunk, its_run, substrate)

        parent, files = self.parent, WorkFiles(self.parent.config.work_dir)
        batches = HeldOut(run, substrate, parent.config.search.num_tokens)
        parent_says: Predictions = {}
        quality = measure_quality(stage_of(run, parent.weights), batches, batches.num_samples, keep=parent_says)
        found = [Result("parent", "", num_parameters(parent.model), 0, **asdict(quality), weights=parent.digest)]
        for subject in self.subjects:
            its_run = parent.forward_run(parent.config.work_dir, subject.model)
            quality = measure_quality(stage_of(its_run, subject.checkpoint), batches, batches.num_samples, parent_says=parent_says)
            result = Result(subject.kind, subject.name, subject.num_parameters, subject.tokens, **asdict(quality), weights=subject.weights)
            found.append(result)
        if substrate.rank == 0:
            results = current_results(parent)
            results.measured_from = evaluation_inputs(parent)
            fresh = {(each.kind, each.name) for each in found}
            results.models = [each for each in results.models if (each.kind, each.name) not in fresh] + found
            save_results(results, files)
            print(results_table(results), flush=True)
        return ExitCode.FINISHED


def measure_speed(parent: Parent, child: Candidate) -> int:
    """Time parent and child on this device, on one rank, and add the times to ``results.json``; return the exit code."""
    run = parent.timing_run(parent.config.work_dir).model_copy(update={"parallel": ParallelConfig()})
    return run_on_ranks(SpeedEntry(parent, child), run)


@dataclass(frozen=True)
class SpeedEntry:
    """Times decoding on one rank."""

    parent: Parent
    child: Candidate

    def __call__(self, run: RunConfig, substrate: Substrate) -> ExitCode:
        """Time parent and child in turns."""
        from tools.minipuzzle.timing import time_decoding

        config = self.parent.config
        models = {"parent": run.model, "long": self.child.model(run.model)}
        timed = time_decoding(
            {name: run.model_copy(update={"model": model}) for name, model in models.items()}, substrate, config.search.latency
        )
        files = WorkFiles(config.work_dir)
        results = current_results(self.parent)
        results.speeds = [Speed(kind=kind, **vars(each)) for kind, each in timed.items()]
        results.timed_from = timing_inputs(self.parent, self.child.name)
        save_results(results, files)
        return ExitCode.FINISHED


def results_table(results: Results) -> str:
    """All models, one aligned line each."""
    lines = [f"{'model':10} {'candidate':20} {'parameters':>14} {'tokens':>12} {'loss':>8} {'accuracy':>9} {'agrees':>8}"]
    for each in results.models:
        agreement = "" if each.agreement is None else f"{each.agreement:8.2%}"
        lines.append(
            f"{each.kind:10} {each.name:20} {each.num_parameters:14,} {each.tokens:12,} {each.loss:8.4f} {each.accuracy:9.2%} "
            f"{agreement:>8}"
        )
    return "\n".join(lines)


def summarise(results: Results) -> list[str]:
    """The findings in sentences, for the end of a run and the report."""
    sentences = []
    names: dict[ResultKind, str] = {"long": "distilled", "finetune": "fine-tuned without a teacher", "scratch": "trained from scratch"}
    for kind, what in names.items():
        share, result = results.recovered(kind), results.find(kind, results.winner)
        if result is None or results.winner is None:
            continue
        if share is None:
            found = "no share of a loss to win back"
        elif share >= 0:
            found = f"{share:.1%} of the loss that pruning cost won back"
        else:
            found = f"{-share:.1%} of what pruning cost lost on top of it"
        sentences.append(f"{what}: loss {result.loss:.4f}, {found}")
    cost = results.cost_of_pruning()
    if cost is not None and cost < LEAST_COST:
        sentences.insert(0, costs_nothing(results))
    if len(results.speeds) == 2:
        before, after = results.speeds
        sentences.append(
            f"decoding at {before.context_tokens:,} tokens of context on {before.device} ({before.precision}, batch {before.batch_size}): "
            f"{before.tokens_per_s:,.1f} -> {after.tokens_per_s:,.1f} tokens/s ({after.tokens_per_s / before.tokens_per_s:.2f} x), "
            f"{before.memory_gib:.3f} -> {after.memory_gib:.3f} GiB"
        )
    return sentences


def costs_nothing(results: Results) -> str:
    """Say of a winner that pruning cost nothing measurable."""
    parent, pruned = results.find("parent"), results.find("pruned", results.winner)
    return (
        f"pruning cost nothing measurable: loss {pruned.loss:.4f} as pruned, {parent.loss:.4f} of the parent; cut deeper, or measure on "
        "more text (search.num_tokens)"
    )


def to_subject(parent: Parent, kind: ResultKind, candidate: Candidate, run_dir: Path) -> Subject:
    """Return a candidate's model by the newest checkpoint of its run directory, which says how many tokens it has seen.

    Raises:
        ValueError: there is none.
    """
    from megatron_hybrid.checkpoint.header import read_header
    from megatron_hybrid.convert.native import NativeSource

    model, source = candidate.model(parent.model), NativeSource(run_dir)
    tokens = read_header(source.path)["state"]["samples"] * parent.data.sequence_length
    return Subject(kind, candidate.name, model, source.path, num_parameters(model), tokens, weights_digest(source))
