"""What candidates are ranked by, and the text that they are ranked on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_hybrid.data.build import build_validation_streams
from tests.runs import small_run, write_corpus
from tools.minipuzzle.config import SearchConfig
from tools.minipuzzle.rank import best_first, repeated_text


@dataclass(frozen=True)
class Measured:
    loss: float
    accuracy: float
    agreement: float


def test_ranking_is_by_accuracy_and_agreement_unless_one_is_asked_for() -> None:
    models = {"hits": Measured(2.2, 0.50, 0.60), "agrees": Measured(2.1, 0.40, 0.80), "low loss": Measured(1.9, 0.45, 0.70)}
    default = SearchConfig().rank_by

    def first(rank_by: str) -> str:
        best = best_first(models.values(), rank_by)[0]
        return next(name for name, model in models.items() if model == best)

    assert default == "accuracy_and_agreement" and first(default) == "agrees"
    assert (first("accuracy"), first("agreement"), first("loss")) == ("hits", "agrees", "low loss")


def test_of_equals_the_lower_loss_is_first() -> None:
    low, high = Measured(1.9, 0.5, 0.5), Measured(2.0, 0.5, 0.5)
    for rank_by in ("accuracy_and_agreement", "accuracy", "agreement"):
        assert best_first([high, low], rank_by) == [low, high]


def test_text_that_is_read_over_and_over_is_warned_of(tmp_path: Path) -> None:
    write_corpus(tmp_path / "held_out")
    run = small_run(tmp_path, validation={"sources": {"text": tmp_path / "held_out"}, "num_batches": 2, "every_steps": 1000})
    streams = build_validation_streams(run)
    there = streams["text"].sources[0].samples_per_epoch
    assert repeated_text(streams, there) == []
    (warning,) = repeated_text(streams, 3 * there)
    length = run.data.sequence_length
    assert f"source text is read 3.0 times for its {3 * there * length:,} of search.num_tokens: it has {there * length:,}" in warning
