"""Files hold as long as what they were made from is there: what a change repeats, what it refuses, and what edits of people are kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hybrid.config.load import load_model
from megatron_hybrid.config.run_directory import CHECKPOINTS_NAME
from tests.tools.minipuzzle.small import compression, whole_plan
from tools.minipuzzle.candidate import Candidate
from tools.minipuzzle.config import MiniPuzzleConfig
from tools.minipuzzle.distill import check_trainings, training_run
from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.inputs import (
    Inputs,
    differences,
    evaluation_inputs,
    latency_inputs,
    scoring_inputs,
    search_inputs,
    timing_inputs,
)
from tools.minipuzzle.latency import LatencyModel, LayerTimes, save_latency
from tools.minipuzzle.parent import find_parent
from tools.minipuzzle.rank import holds_times, load_candidates, search
from tools.minipuzzle.results import Results, choose_winner, current_results, load_results
from tools.minipuzzle.run import chosen_candidates, prune_chosen, run
from tools.minipuzzle.scores import load_scores, read_json, save_scores, synthetic_scores, vectors_path, write_json
from tools.minipuzzle.search import damage_of


def plan_in(copy: WorkFiles, folder: Path, **sections: Any) -> MiniPuzzleConfig:
    return whole_plan(folder, work_dir=copy.work_dir, **sections)


def changed(recorded: Inputs, present: Inputs) -> set[str]:
    """The first parts of the names that differ."""
    return {line.split(" was ")[0] for line in differences(recorded, present)}


def on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_hybrid.substrate.environment.device_name", lambda device: "another")


BATCH = {"global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"}
SEARCH = {"ffn_hidden_sizes": [48, 64, 96], "num_tokens": 640, "num_evaluated": 4, "top_k": 2}


@pytest.mark.parametrize(
    ("sections", "scores", "candidates", "results"),
    [
        ({}, set(), set(), set()),
        # How the work is shared changes no figure.
        ({"batch": {**BATCH, "micro_batch_size": 4, "global_batch_size": 16}, "parallel": {"tensor": 2}}, set(), set(), set()),
        ({"runtime": {"threads_per_rank": 2}, "logging": {"every_steps": 7}}, set(), set(), set()),
        ({"seed": 999}, {"seed"}, {"seed"}, {"seed"}),
        ({"batch": {**BATCH, "precision": "bf16"}}, {"batch.precision"}, {"batch.precision"}, {"batch.precision"}),
        ({"validation": {"sources": {"other": "held_out"}}}, set(), *[{"validation.sources.other", "validation.sources.text"}] * 2),
        ({"search": {**SEARCH, "num_tokens": 1280}}, set(), {"search.num_tokens"}, {"search.num_tokens"}),
        ({"search": {**SEARCH, "top_k": 1}}, set(), {"search.top_k"}, set()),
        # Without a limit, how decoding is timed is the report's alone.
        ({"search": {**SEARCH, "latency": {"context_tokens": 64, "batch_size": 2, "repetitions": 3}}}, set(), set(), set()),
    ],
    ids=["nothing", "layout", "runtime", "seed", "precision", "validation", "num_tokens", "top_k", "latency"],
)
def test_what_options_reach(
    sections: dict, scores: set[str], candidates: set[str], results: set[str], parent_folder: Path, work: WorkFiles
) -> None:
    parent = find_parent(whole_plan(parent_folder, **sections))
    assert changed(load_scores(work.scores).made_from, scoring_inputs(parent)) == scores
    present = search_inputs(parent, load_scores(work.scores))
    assert changed(read_json(work.candidates, "")["made_from"], present) == candidates
    assert changed(load_results(work).measured_from, evaluation_inputs(parent)) == results


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads decide times on a CPU alone."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.usefixtures("on_a_cpu")
def test_measured_times_are_of_one_setting(parent_folder: Path) -> None:
    def inputs(search: dict | None = None, **sections: Any) -> Inputs:
        return latency_inputs(find_parent(compression(parent_folder, search=SEARCH | (search or {}), **sections)))

    as_measured = inputs()
    assert not differences(as_measured, inputs({"latency": {"limit_ms": 3.0}, "num_tokens": 1280}))
    for other in (
        inputs({"latency": {"context_tokens": 64}}),
        inputs({"latency": {"batch_size": 2}}),
        inputs({"hidden_sizes": [32, 64]}),
        inputs({"ffn_hidden_sizes": [32, 96]}),
        inputs(parallel={"tensor": 2}),
        inputs(batch={**BATCH, "precision": "bf16"}),
        inputs(kernels={"attention": "reference"}),
        inputs(runtime={"threads_per_rank": 2}),
        as_measured | {"device": "another"},
    ):
        assert len(differences(as_measured, other)) == 1


@pytest.mark.usefixtures("on_a_cpu")
def test_decoding_is_timed_anew_where_its_speed_may_be_another(parent_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def inputs(**sections: Any) -> Inputs:
        return timing_inputs(find_parent(compression(parent_folder, **sections)), "child")

    as_timed = inputs()
    for name, sections in {
        "search.latency.repetitions": {"search": {"latency": {"repetitions": 3}}},
        "kernels.attention": {"kernels": {"attention": "reference"}},
        "runtime.threads_per_rank": {"runtime": {"threads_per_rank": 2}},
    }.items():
        assert changed(as_timed, inputs(**sections)) == {name}
    on_another_machine(monkeypatch)
    assert changed(as_timed, inputs()) == {"device"}


def test_candidates_hold_where_the_times_that_they_were_found_by_do_not(
    parent_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search on one GPU, distillation on a cluster of others, the report on a host without any."""
    limited = {"latency": {"limit_ms": 20.0}}
    parent, files = find_parent(compression(parent_folder, work_dir=tmp_path, search=SEARCH | limited)), WorkFiles(tmp_path)
    scores, times = synthetic_scores(parent.model, 0), LayerTimes(64, 8, 16, 1.0, 5.0, 2.0, 0.5, 0.01)
    measured = LatencyModel("cpu", "fp32", 8192, 1, (times,), latency_inputs(parent))
    save_latency(measured, files.latency)
    found_by = search_inputs(parent, scores)
    assert holds_times(files, parent)
    on_another_machine(monkeypatch)
    assert not holds_times(files, parent)
    assert search_inputs(parent, scores) == found_by
    save_latency(replace(measured, times=(replace(times, attention=4.0),)), files.latency)
    assert changed(found_by, search_inputs(parent, scores)) == {"latency"}
    files.latency.unlink()
    assert changed(found_by, search_inputs(parent, scores)) == {"latency"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"distill": {"temperature": 3.0}}, r"short/\S+ was made from something else: distill.temperature was 1.0, is 3.0. Remove .*short"),
        ({"distill": {"optimizer": {"lr": 0.1}}}, "optimizer.lr was 0.001, is 0.1"),
        ({"distill": {"long_tokens": 640}}, r"long/\S+ was made from something else: tokens was 1280, is 640"),
        ({"seed": 999}, "seed was 1234, is 999"),
        ({"batch": {**BATCH, "precision": "bf16"}}, "batch.precision was fp32, is bf16"),
    ],
    ids=["temperature", "lr", "tokens", "seed", "precision"],
)
def test_a_training_that_was_made_with_other_options_is_refused_before_any_work(
    sections: dict, message: str, parent_folder: Path, copy: WorkFiles
) -> None:
    before = {file: file.stat().st_mtime_ns for file in copy.work_dir.rglob("*")}
    with pytest.raises(ValueError, match=message):
        run(plan_in(copy, parent_folder, **sections))
    assert before == {file: file.stat().st_mtime_ns for file in copy.work_dir.rglob("*")}


def test_a_training_that_does_not_say_what_it_was_made_from_is_refused(parent_folder: Path, tmp_path: Path) -> None:
    """As those that were begun before trainings had records."""
    parent, directory = find_parent(compression(parent_folder, work_dir=tmp_path)), WorkFiles(tmp_path).run_dir("short", "child")
    shutil.copytree(parent_folder / "parent" / CHECKPOINTS_NAME, directory / CHECKPOINTS_NAME)
    with pytest.raises(ValueError, match=r"short/child has checkpoints, but no made_from.json .* cannot be told. Remove the directory"):
        check_trainings(parent, ["child"])


def test_a_stage_by_itself_refuses_what_run_would_make_anew(parent_folder: Path, copy: WorkFiles) -> None:
    with pytest.raises(ValueError, match="scores.json was made from something else: score.layer_samples was 6, is 5. Score again"):
        search(plan_in(copy, parent_folder, score={"axes": ["layers", "ffn", "mamba", "hidden"], "layer_samples": 5, "width_samples": 10}))
    with pytest.raises(ValueError, match="candidates.json was made from something else: search.top_k was 2, is 1. Search again"):
        prune_chosen(find_parent(plan_in(copy, parent_folder, search={**SEARCH, "top_k": 1})))


def test_a_stage_wants_the_options_of_no_later_one(parent_folder: Path, copy: WorkFiles) -> None:
    assert run(compression(parent_folder, work_dir=copy.work_dir, distill=None), "search") == 0


def test_results_of_weights_that_are_gone_do_not_count(parent_folder: Path, copy: WorkFiles) -> None:
    parent, whole = find_parent(plan_in(copy, parent_folder)), load_results(copy)
    assert current_results(parent) == whole and len(whole.models) == 8 and len(whole.speeds) == 2
    # As if it had been removed and trained anew: other weights under the same name, at the same step.
    long, finetune = (copy.run_dir(kind, whole.winner) / "checkpoints" for kind in ("long", "finetune"))
    shutil.rmtree(long)
    shutil.copytree(finetune, long)
    present = current_results(parent)
    assert [each for each in whole.models if each not in present.models] == [whole.find("long", whole.winner)]
    shutil.rmtree(copy.run_dir("scratch", whole.winner))
    assert current_results(parent).find("scratch") is None
    other_text = find_parent(plan_in(copy, parent_folder, search={**SEARCH, "num_tokens": 1280}))
    assert current_results(other_text).models == []
    other_context = find_parent(plan_in(copy, parent_folder, search={**SEARCH, "latency": {"context_tokens": 64}}))
    assert current_results(other_context).speeds == [] and len(present.speeds) == 2


def test_edited_scores_reach_the_pruned_model(parent_folder: Path, copy: WorkFiles) -> None:
    parent = find_parent(plan_in(copy, parent_folder))
    scores, content = load_scores(copy.scores), read_json(copy.candidates, "")
    save_scores(replace(scores, neurons={layer: values[::-1] for layer, values in scores.neurons.items()}), copy.scores)
    with pytest.raises(ValueError, match=r"candidates.json was made from something else: scores was \w+, is \w+. Search again"):
        prune_chosen(parent)
    # What a search with these scores would leave.
    write_json(copy.candidates, content | {"made_from": search_inputs(parent, load_scores(copy.scores))})
    narrow = [each for each in prune_chosen(parent) if min(each.candidate.ffn_hidden_sizes, default=96) < 96]
    assert narrow
    assert not any(current_results(parent).find("pruned", each.candidate.name) for each in narrow)
    with pytest.raises(ValueError, match=r"short/\S+ was made from something else: pruned weights was \w+, is \w+"):
        training_run(parent, narrow[0].candidate, "short")


def test_candidates_that_a_person_adds_or_changes(parent_folder: Path, copy: WorkFiles) -> None:
    parent, content = find_parent(plan_in(copy, parent_folder)), read_json(copy.candidates, "")
    added = Candidate((0, 1, 3, 5), (40,), 8, 8, 64)
    changed_line = json.loads(json.dumps(content["candidates"][0]))
    changed_line["candidate"]["layers"].pop(0)
    lines = [{"candidate": added.to_json(), "chosen": True}, changed_line, *content["candidates"]]
    write_json(copy.candidates, content | {"candidates": lines})
    listed = load_candidates(parent)
    scores = load_scores(copy.scores)
    assert listed[0].candidate == added and listed[0] in chosen_candidates(parent) and listed[0].loss is None
    for each in listed[:2]:
        assert each.damage == pytest.approx(damage_of(scores, each.candidate)) and 0 < each.memory_gib < listed[2].memory_gib
    # The figures that stand in the line were another candidate's.
    assert changed_line["loss"] is not None and listed[1].loss is None
    first = content["candidates"][0]
    for lines, message in (
        ([first | {"chose": True}], "candidate 0: unknown key chose; a line may have name, candidate, damage"),
        ([first | {"chosen": "yes"}], "candidate 0: chosen must be true or false, got 'yes'"),
        ([first | {"damage": "much"}], r"candidate 0: \['damage'\] must be numbers"),
        ([first, {}], "candidate 1: expected a mapping with candidate"),
        ("none", "must have a list of candidates; search again"),
    ):
        write_json(copy.candidates, content | {"candidates": lines})
        with pytest.raises(ValueError, match=message):
            load_candidates(parent)
    for text, message in (("{}", "must have a list of candidates"), ("[]", r"cannot be read \(expected a mapping\)")):
        copy.candidates.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_candidates(parent)


def test_scores_in_any_order(tmp_path: Path) -> None:
    scores, file = synthetic_scores(load_model("hybrid-cpu-12m")[0], 0), tmp_path / "scores.json"
    save_scores(scores, file)
    content = read_json(file, "")
    write_json(file, content | {"layers": sorted(content["layers"], key=lambda layer: layer["mse"])})
    np.testing.assert_array_equal(load_scores(file).layer_mse, scores.layer_mse)
    np.testing.assert_array_equal(load_scores(file).layer_rank, scores.layer_rank)
    assert load_scores(file).digest == scores.digest and vectors_path(file).exists()
    layers = content["layers"]
    for wrong in (layers[1:], [*layers, layers[0]], [layers[0] | {"kind": "attention"}, *layers[1:]], [{}], 3):
        write_json(file, content | {"layers": wrong})
        with pytest.raises(ValueError, match=r"are no scores \(.*\); score anew"):
            load_scores(file)
    edited = replace(scores, layer_rank=scores.layer_rank[::-1].copy())
    assert edited.digest != scores.digest


def test_an_edited_winner_is_kept_while_it_was_chosen_by_these_figures() -> None:
    quality = {"a": 1.0, "b": 2.0}
    assert choose_winner(Results(), quality) == "b"
    assert choose_winner(Results(winner="a", winner_from=quality), quality) == "a"
    assert choose_winner(Results(winner="a", winner_from=quality | {"b": 1.5}), quality) == "b"
    with pytest.raises(ValueError, match="winner c is none of the chosen candidates; name one of a, b, or null"):
        choose_winner(Results(winner="c", winner_from=quality), quality)
