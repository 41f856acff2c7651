"""How well the sum over layers, by which the search keeps to a limit on latency, foretold what whole models take; and the limit itself."""

from __future__ import annotations

from dataclasses import dataclass

from tools.minipuzzle.candidate import Candidate
from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.latency import load_latency
from tools.minipuzzle.parent import Parent
from tools.minipuzzle.rank import holds_times
from tools.minipuzzle.results import ResultKind, Results


@dataclass(frozen=True)
class Prediction:
    """A decoding step of a whole model, in milliseconds."""

    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """Share of the measured time by which the prediction is too high (above 0) or too low."""
        return self.predicted_ms / self.measured_ms - 1

    def describe(self) -> str:
        """For a sentence.

        >>> Prediction(1.1, 1.0).describe()
        '1.100 ms predicted, 1.000 measured (+10.0 %)'
        """
        return f"{self.predicted_ms:.3f} ms predicted, {self.measured_ms:.3f} measured ({100 * self.error:+.1f} %)"


def compare_predictions(parent: Parent, results: Results, winner: Candidate | None) -> dict[ResultKind, Prediction]:
    """Return what was foretold and measured of ``parent`` and winner (``long``).

    Empty where there is nothing to compare: no limit was searched for, decoding is not timed, or layers were timed on several tensor ranks
    and whole models, as ever, on one.
    """
    files = WorkFiles(parent.config.work_dir)
    is_limited, tensor = parent.config.search.latency.limit_ms is not None, parent.config.parallel.tensor
    if winner is None or not results.speeds or not is_limited or tensor > 1 or not holds_times(files, parent):
        return {}
    latency = load_latency(files.latency)
    models = {"parent": parent.model, "long": winner.model(parent.model)}
    return {
        each.kind: Prediction(latency.predict(models[each.kind]), each.decode_ms)
        for each in results.speeds
        if latency.covers(models[each.kind])
    }


def describe_predictions(predictions: dict[ResultKind, Prediction], limit_ms: float | None) -> list[str]:
    """Say in sentences how good they are, and whether the winner, as measured, keeps to ``search.latency.limit_ms``.

    >>> describe_predictions({"long": Prediction(1.0, 1.25)}, 1.1)[-1]
    'the child takes 1.250 ms per step, longer than search.latency.limit_ms=1.1: the prediction was too low; search with a limit of 0.88'
    """
    if not predictions:
        return []
    names = {"parent": "parent", "long": "child"}
    parts = (f"{names[kind]} {each.describe()}" for kind, each in predictions.items())
    sentences = ["a decoding step, as the sum of its layers' times and as a whole: " + "; ".join(parts)]
    child = predictions.get("long")
    if child is None or limit_ms is None:
        return sentences
    if child.measured_ms <= limit_ms:
        return [*sentences, f"the child takes {child.measured_ms:.3f} ms per step, within search.latency.limit_ms={limit_ms:g}"]
    advice = f"the prediction was too low; search with a limit of {limit_ms * child.predicted_ms / child.measured_ms:.3g}"
    return [*sentences, f"the child takes {child.measured_ms:.3f} ms per step, longer than search.latency.limit_ms={limit_ms:g}: {advice}"]
