"""Compressions over seeds: means and deviations from their result files, and the picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hybrid.config.load import load_model
from tools.minipuzzle.comparison import Spread, compare, comparison_table, write_comparison
from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.results import Result, ResultKind, Results, Speed, load_results, save_results, summarise
from tools.minipuzzle.scores import save_scores, synthetic_scores

LOSSES: dict[ResultKind, float] = {"parent": 2.0, "pruned": 2.4, "short": 2.3, "long": 2.1, "finetune": 2.2, "scratch": 4.0}


def write_results(work_dir: Path, *, shift: float = 0.0, pruned: float = 2.4, weights: str = "b6f2", winner: str | None = "child") -> Path:
    losses = LOSSES | {"pruned": pruned}
    models = [
        Result(kind, "" if kind == "parent" else "child", 1000 if kind == "parent" else 830, 0, loss + shift * (kind == "long"), 0.5, None)
        for kind, loss in losses.items()
    ]
    # Another candidate, which lost.
    models.append(Result("pruned", "loser", 840, 0, 9.0, 0.1, None))
    speeds = [Speed(kind, "H100", "bf16", 65536, 8, decode_ms, 1.0, None) for kind, decode_ms in (("parent", 1.2), ("long", 1.0))]
    save_results(Results(models, winner, speeds), WorkFiles(work_dir))
    save_scores(replace(synthetic_scores(load_model("hybrid-cpu-12m")[0], seed=0), checkpoint=weights), WorkFiles(work_dir).scores)
    return work_dir


def test_means_and_deviations_are_of_the_winners(tmp_path: Path) -> None:
    comparison = compare([write_results(tmp_path / str(seed), shift=0.04 * seed) for seed in range(3)])
    assert comparison.losses("pruned").values == (2.4, 2.4, 2.4)
    assert comparison.recovered("long").values == pytest.approx([0.75, 0.65, 0.55])
    assert comparison.recovered("long").mean == pytest.approx(0.65) and comparison.recovered("long").deviation == pytest.approx(0.1)
    assert comparison.recovered("scratch").mean == pytest.approx(-4.0)
    assert comparison.parameter_shares().mean == 0.83 and comparison.speedup().mean == pytest.approx(1.2)
    table = comparison_table(comparison)
    for text in (
        "65.0 +- 10.0 %",
        "75.0%, 65.0%, 55.0%",
        "fine-tuned without a teacher",
        "83.0 +- 0.0 % of the parent's 1,000",
        "1.200 +- 0.000 times",
    ):
        assert text in table
    page = write_comparison(comparison, tmp_path / "page")
    assert "65.0 +- 10.0 %" in page.read_text() and (tmp_path / "page/comparison.png").stat().st_size > 5000


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    assert Spread((1.0,)).deviation is None
    assert "75.0 %" in comparison_table(compare([write_results(tmp_path / "one")]))


@pytest.mark.parametrize("pruned", [2.0, 1.999, 2.00005])
def test_a_pruning_that_cost_nothing_has_no_share_to_win_back(pruned: float, tmp_path: Path) -> None:
    """Equal losses would divide by zero, and a pruned model that is better by chance would have won back thousands of percent."""
    free = write_results(tmp_path / "free", pruned=pruned)
    results = load_results(WorkFiles(free))
    assert results.cost_of_pruning() == pytest.approx(pruned - 2.0) and results.recovered("long") is None
    sentences = summarise(results)
    assert sentences[0].startswith(f"pruning cost nothing measurable: loss {pruned:.4f} as pruned, 2.0000 of the parent; cut deeper")
    assert "distilled: loss 2.1000, no share of a loss to win back" in sentences
    alone = compare([free])
    assert alone.recovered("long") is None and "free has no share that was won back: pruning cost nothing" in comparison_table(alone)
    write_comparison(alone, tmp_path / "page")
    # Beside others, the mean is theirs.
    both = compare([free, write_results(tmp_path / "costly")])
    assert both.recovered("long").values == (pytest.approx(0.75),) and "-, 75.0%" in comparison_table(both)


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one has no distilled winner yet; run its compression to the end first"):
        compare([write_results(tmp_path / "one", winner=None)])
    with pytest.raises(
        ValueError, match="only compressions of one parent can be compared; .*one compressed weights b6f2, .*two compressed weights 03ac"
    ):
        compare([write_results(tmp_path / "one"), write_results(tmp_path / "two", weights="03ac")])
