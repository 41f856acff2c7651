"""What the benchmarks of MiniPuzzle are asked for and cannot do, and the rates that a baseline is tried with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.minipuzzle import main as time_parts
from benchmarks.minipuzzle_end_to_end import best_rate, copy_for_rate, finetune_rate, keep_trial, main as run_all
from megatron_hybrid.checkpoint.store import complete_steps
from megatron_hybrid.config.run_directory import CHECKPOINTS_NAME
from tests.tools.minipuzzle.small import compression, whole_plan
from tools.minipuzzle.config import load_minipuzzle
from tools.minipuzzle.distill import MADE_FROM, training_run
from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.parent import find_parent
from tools.minipuzzle.results import Result, Results, load_results
from tools.minipuzzle.run import chosen_candidates


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (run_all, ["--jobs", "0"], "--jobs must be above 0, got 0"),
        (run_all, ["--seeds", "0"], "--seeds must be above 0, got 0"),
        (run_all, ["--text-mb", "-1"], "--text-mb must be above 0, got -1"),
        (run_all, ["--finetune-rates", "1e-4", "0"], "--finetune-rates must be above 0"),
        (time_parts, ["loss", "--preset", "nope"], "--preset: cannot use nope"),
        (time_parts, ["loss", "--tokens", "0"], "--tokens must be above 0, got 0"),
        (time_parts, ["decode", "--share", "-0.5"], "--share must be above 0, got -0.5"),
    ],
)
def test_bad_options_end_before_any_work(main, options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_baseline_has_a_rate_of_its_own(parent_folder: Path, copy: WorkFiles) -> None:
    config = load_minipuzzle("examples/minipuzzle/gpu.yaml", [finetune_rate(2e-4)])
    assert config.baselines.finetune_optimizer.lr == 2e-4 and config.baselines.finetune_optimizer.min_lr == 2e-6

    def rates(**sections) -> list[float]:
        parent = find_parent(compression(parent_folder, work_dir=copy_for_rate(copy.work_dir, 2e-4), **sections))
        candidate = chosen_candidates(parent)[0].candidate
        return [training_run(parent, candidate, kind).optimizer.lr for kind in ("finetune", "scratch")]

    assert rates() == [1e-3, 1e-3] and rates(baselines={"finetune_optimizer": {"lr": 2e-4}}) == [2e-4, 1e-3]


def test_a_rate_is_tried_from_the_same_pruned_weights(copy: WorkFiles) -> None:
    trial = copy_for_rate(copy.work_dir, 1e-4)
    assert trial.name == "work-finetune-0.0001" and copy_for_rate(copy.work_dir, 1e-4) == trial
    assert not (trial / "finetune").exists() and not (trial / "scratch").exists()
    assert load_results(WorkFiles(trial)) == load_results(copy)
    (linked, *_) = [file for file in (trial / "pruned").rglob("*") if file.is_file() and file.stat().st_size > 1000]
    assert linked.samefile(copy.work_dir / linked.relative_to(trial))


def test_the_trial_that_wins_is_the_first_seeds_own_training(parent_folder: Path, copy: WorkFiles) -> None:
    trial, seed = copy.work_dir, copy_for_rate(copy.work_dir, 1e-4)
    keep_trial(trial, seed)
    parent = find_parent(whole_plan(parent_folder, work_dir=seed))
    winner = next(each.candidate for each in chosen_candidates(parent) if each.candidate.name == load_results(copy).winner)
    run = training_run(parent, winner, "finetune")
    assert run.train.steps in complete_steps(run.run_dir / CHECKPOINTS_NAME)
    assert (run.run_dir / MADE_FROM).samefile(copy.run_dir("finetune", winner.name) / MADE_FROM)
    assert not list(seed.glob("*.partial"))
    # What is there, of whatever rate, is left as it is: a training that does not fit is refused by itself.
    shutil.rmtree(seed / "finetune")
    (seed / "finetune").mkdir()
    keep_trial(trial, seed)
    assert not list((seed / "finetune").iterdir())


def test_the_best_rate_is_that_of_the_least_loss(capsys: pytest.CaptureFixture) -> None:
    tried = {
        rate: Results([Result("finetune", "child", 1, 1, loss, 0.5, None)], winner="child")
        for rate, loss in ((1e-5, 3.0), (1e-4, 2.9), (1e-3, 3.1))
    }
    assert best_rate(tried) == 1e-4 and "2.9000  <- for every seed" in capsys.readouterr().out
    assert best_rate({rate: tried[rate] for rate in (1e-4, 1e-3)}) == 1e-4
    assert "try rates beyond it" in capsys.readouterr().out
