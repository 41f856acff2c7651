"""The whole plan on a small parent: every stage leaves its file, a second start does nothing, and bad input ends early."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tools.minipuzzle.small import compression
from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.parent import find_parent
from tools.minipuzzle.rank import load_candidates
from tools.minipuzzle.results import load_results
from tools.minipuzzle.run import chosen_candidates, run
from tools.minipuzzle.scores import load_scores


def run_plan(folder: Path) -> tuple[int, float]:
    """All stages, then again; runs on one rank. Returns the exit code and the time of the second start relative to the first."""
    import os
    import time

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    config = compression(folder, baselines={"scratch": True, "finetune": True})
    start_s = time.perf_counter()
    code = run(config)
    first_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    return max(code, run(config)), (time.perf_counter() - start_s) / first_s


@pytest.fixture(scope="module")
def work(parent_folder: Path, rank_pool) -> WorkFiles:
    ((code, relative),) = rank_pool.run(run_plan, 1, parent_folder, timeout_s=280.0)
    assert code == 0 and relative < 0.5
    return WorkFiles(parent_folder / "work")


def test_every_stage_leaves_its_file(parent_folder: Path, work: WorkFiles) -> None:
    parent = find_parent(compression(parent_folder))
    assert load_scores(work.scores).checkpoint == parent.digest
    listed = load_candidates(work, parent.model)
    chosen = chosen_candidates(parent)
    assert len(chosen) == 2 and sum(each.is_exact for each in listed) == 1
    results = load_results(work)
    kinds = [each.kind for each in results.models]
    assert sorted(kinds) == sorted(["parent", "pruned", "pruned", "short", "short", "long", "finetune", "scratch"])
    long = results.find("long", results.winner)
    assert long.tokens == results.find("scratch", results.winner).tokens == results.find("finetune", results.winner).tokens == 1280
    assert results.recovered("long") is not None and [each.kind for each in results.speeds] == ["parent", "long"]
    page = work.report.read_text()
    for name in ("importance", "candidates", "layers", "loss"):
        assert f'src="report/{name}.png"' in page and (work.work_dir / f"report/{name}.png").stat().st_size > 5000
    for text in (results.winner, "won back", "tokens/s"):
        assert text in page


def test_ranking_is_what_the_pruned_model_does(parent_folder: Path, work: WorkFiles) -> None:
    """A candidate that was ranked as the parent with parts left out has the quality of its own checkpoint."""
    parent = find_parent(compression(parent_folder))
    results = load_results(work)
    for each in chosen_candidates(parent):
        measured = results.find("pruned", each.candidate.name)
        assert measured.loss == pytest.approx(each.loss, rel=1e-5)
        assert measured.accuracy == pytest.approx(each.accuracy, abs=2e-3) and measured.agreement == pytest.approx(each.agreement, abs=2e-3)


def test_the_candidates_file_may_be_edited(parent_folder: Path, work: WorkFiles) -> None:
    parent, before = find_parent(compression(parent_folder)), work.candidates.read_text()
    content = json.loads(before)
    try:
        for each in content["candidates"]:
            each["chosen"] = False
        work.candidates.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="no candidate with chosen: true"):
            chosen_candidates(parent)
        content["candidates"][0]["candidate"]["layers"].append(99)
        work.candidates.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="candidate 0: layers must be numbers of the parent's 8 layers"):
            load_candidates(work, parent.model)
    finally:
        work.candidates.write_text(before)


def test_bad_input_is_one_error_before_any_work(parent_folder: Path, tmp_path: Path) -> None:
    from tools.minipuzzle.rank import search
    from tools.minipuzzle.scores import save_scores, synthetic_scores

    with pytest.raises(ValueError, match="neither a run directory, nor a checkpoint, nor a preset"):
        find_parent(compression(parent_folder, parent="nowhere"))
    with pytest.raises(ValueError, match="is a preset and has no weights"):
        _ = find_parent(compression(parent_folder, parent="nemotron-h-8b")).weights
    with pytest.raises(ValueError, match="missing option 'distill'"):
        run(compression(parent_folder, distill=None))
    elsewhere = compression(parent_folder, work_dir=tmp_path)
    with pytest.raises(ValueError, match="scores.json is not there; run the score stage first"):
        search(elsewhere)
    save_scores(synthetic_scores(find_parent(elsewhere).model, 0), WorkFiles(tmp_path).scores)
    with pytest.raises(ValueError, match="scores another checkpoint: it names weights synthetic"):
        search(elsewhere)


def test_layouts_that_do_not_divide_after_pruning(parent_folder: Path, work: WorkFiles) -> None:
    from tools.minipuzzle.rank import search

    odd = {"ffn_hidden_sizes": [50], "num_tokens": 640}
    with pytest.raises(ValueError, match="model.ffn_hidden_size=50 does not divide by parallel.tensor=4"):
        search(compression(parent_folder, parallel={"tensor": 4}, search=odd))


def test_a_tokenizer_that_is_not_the_teachers(parent_folder: Path, tmp_path: Path) -> None:
    from megatron_hybrid.config import load_config
    from megatron_hybrid.data.tokenizer_training import train_sentencepiece

    texts = ["some words to learn from, again and again", "other words, and numbers 1 2 3 4 5 6 7 8 9"] * 50
    paths = []
    for number in range(2):
        path = tmp_path / f"tokenizer{number}.model"
        path.write_bytes(train_sentencepiece(iter(texts), 300 + 2 * number, max_bytes=1 << 20))
        paths.append(path)
    data = {"sources": {"text": parent_folder / "text"}, "sequence_length": 40}
    parent = find_parent(compression(parent_folder, data={**data, "tokenizer": {"path": paths[0]}}))
    run_of = load_config(parent_folder / "parent/config.yaml")
    named = run_of.data.model_copy(update={"tokenizer": run_of.data.model_validate({**data, "tokenizer": {"path": paths[1]}}).tokenizer})
    parent.__dict__["run"] = run_of.model_copy(update={"data": named})
    with pytest.raises(ValueError, match="another tokenizer than the parent's .*the student would learn other tokens"):
        _ = parent.data


def test_command_line(parent_folder: Path, work: WorkFiles, capsys: pytest.CaptureFixture) -> None:
    from tools.minipuzzle.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "examples:" in capsys.readouterr().out
    assert main(["search", "nowhere.yaml"]) == 2
    assert "error: cannot use nowhere.yaml" in capsys.readouterr().err
    assert main(["search", "examples/minipuzzle/nemotron_h_56b.yaml", "search.memory.limit_gib=1", f"work_dir={work.work_dir}/none"]) == 2
    assert "the smallest that the grid reaches" in capsys.readouterr().err
