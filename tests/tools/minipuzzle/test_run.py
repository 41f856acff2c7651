"""The whole plan on a small parent: every stage leaves its file, a second start does nothing, and bad input ends early."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tools.minipuzzle.small import compression, whole_plan
from tools.minipuzzle.candidate import Candidate
from tools.minipuzzle.config import LayerLossConfig, MiniPuzzleConfig
from tools.minipuzzle.distill import distill_options, layer_loss_options
from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.latency import load_latency
from tools.minipuzzle.parent import find_parent
from tools.minipuzzle.rank import Listed, load_candidates, rank_candidates, search
from tools.minipuzzle.results import load_results
from tools.minipuzzle.run import chosen_candidates, run
from tools.minipuzzle.scores import load_scores


def test_every_stage_leaves_its_file(parent_folder: Path, work: WorkFiles) -> None:
    parent = find_parent(compression(parent_folder))
    assert load_scores(work.scores).checkpoint == parent.digest
    listed = load_candidates(parent)
    chosen = chosen_candidates(parent)
    assert len(chosen) == 2 and sum(each.is_exact for each in listed) == 1
    results = load_results(work)
    kinds = [each.kind for each in results.models]
    assert sorted(kinds) == sorted(["parent", "pruned", "pruned", "short", "short", "long", "finetune", "scratch"])
    long = results.find("long", results.winner)
    assert long.tokens == results.find("scratch", results.winner).tokens == results.find("finetune", results.winner).tokens == 1280
    assert results.cost_of_pruning() is not None and [each.kind for each in results.speeds] == ["parent", "long"]
    page = work.report.read_text()
    for name in ("importance", "candidates", "layers", "loss"):
        assert f'src="report/{name}.png"' in page and (work.work_dir / f"report/{name}.png").stat().st_size > 5000
    for text in (results.winner, "distilled: loss", "tokens/s"):
        assert text in page


def test_a_second_start_does_nothing(parent_folder: Path, copy: WorkFiles) -> None:
    def written() -> dict[Path, int]:
        # The winner may be edited between two starts, so that results.json is written whenever it is chosen.
        return {file: file.stat().st_mtime_ns for file in copy.work_dir.rglob("*") if file.is_file() and file != copy.results}

    before, results = written(), copy.results.read_text()
    assert run(whole_plan(parent_folder, work_dir=copy.work_dir), "distill") == 0
    assert written() == before and copy.results.read_text() == results


def test_the_student_is_compared_with_its_parent_between_layers(work: WorkFiles) -> None:
    results = load_results(work)
    lines = (work.run_dir("long", results.winner) / "metrics.jsonl").read_text().splitlines()
    steps = [record["metrics"] for record in map(json.loads, lines) if "layers" in record.get("metrics", {})]
    assert steps and all(step["loss"] == pytest.approx(step["kl"] + 0.1 * step["layers"], rel=1e-5) for step in steps)


def test_layers_of_parent_and_student_that_stand_at_the_same_place() -> None:
    child = Candidate((1, 2, 4, 7), (), 8, 8, 32)

    def pairs(**options) -> list[tuple[int, int, float]]:
        config = LayerLossConfig(weight=1.0, **options)
        return [(pair.student, pair.teacher, pair.weight) for pair in layer_loss_options(config, child).pairs]

    assert pairs() == [(0, 1, 1.0), (1, 2, 1.0), (2, 4, 1.0), (3, 7, 1.0)]
    # Layers 3, 5 and 6 are gone: the student's stream at their place is that after the last layer kept before.
    assert pairs(layers=(3, 6, 7), layer_weights=(1.0, 2.0, 3.0)) == [(1, 3, 1.0), (2, 6, 2.0), (3, 7, 3.0)]
    with pytest.raises(ValueError, match=r"names layer 0, but .* keeps none of the parent's before its layer 1"):
        pairs(layers=(0, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3, 1]}, "must be numbers of the parent's layers, ascending, each once"),
        ({"layers": [1, 2], "layer_weights": [1.0]}, "1 layer_weights for 2 layers; give one for each, or none"),
        ({"layers": [1], "layer_weights": [0.0]}, r"layer_weights=\[0.0\] must be above 0"),
        ({"layers": [2, 8]}, r"distill.layer_loss.layers=\[2, 8\] must be layers of the parent, which has 0 to 7"),
        ({"pipeline": 2}, "distill.layer_loss needs parallel.pipeline=1, got 2"),
    ],
)
def test_layer_losses_that_cannot_be(options: dict, message: str, parent_folder: Path) -> None:
    pipeline = options.get("pipeline", 1)
    layer_loss = {"weight": 1.0, **{name: value for name, value in options.items() if name != "pipeline"}}
    distill = {"short_tokens": 640, "long_tokens": 640, "optimizer": {"lr": 1e-3}, "layer_loss": layer_loss}
    with pytest.raises(ValueError, match=message):
        distill_options(find_parent(compression(parent_folder, distill=distill, parallel={"pipeline": pipeline})))


def test_ranking_is_what_the_pruned_model_does(parent_folder: Path, work: WorkFiles) -> None:
    """A candidate that was ranked as the parent with parts left out has the quality of its own checkpoint."""
    parent = find_parent(compression(parent_folder))
    results = load_results(work)
    for each in chosen_candidates(parent):
        measured = results.find("pruned", each.candidate.name)
        assert measured.loss == pytest.approx(each.loss, rel=1e-5)
        assert measured.accuracy == pytest.approx(each.accuracy, abs=2e-3) and measured.agreement == pytest.approx(each.agreement, abs=2e-3)


def test_the_candidates_file_may_be_edited(parent_folder: Path, copy: WorkFiles) -> None:
    parent, content = find_parent(compression(parent_folder, work_dir=copy.work_dir)), json.loads(copy.candidates.read_text())
    for each in content["candidates"]:
        each["chosen"] = False
    copy.candidates.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no candidate with chosen: true"):
        chosen_candidates(parent)
    content["candidates"][0]["candidate"]["layers"].append(99)
    copy.candidates.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="candidate 0: layers must be numbers of the parent's 8 layers"):
        load_candidates(parent)


def test_bad_input_is_one_error_before_any_work(parent_folder: Path, tmp_path: Path) -> None:
    from tools.minipuzzle.scores import save_scores, synthetic_scores

    with pytest.raises(ValueError, match="neither a run directory, nor a checkpoint, nor a preset"):
        find_parent(compression(parent_folder, parent="nowhere"))
    with pytest.raises(ValueError, match="is a preset and has no weights"):
        _ = find_parent(compression(parent_folder, parent="nemotron-h-8b")).weights
    with pytest.raises(ValueError, match="is a preset and has no weights"):
        run(compression(parent_folder, parent="nemotron-h-56b", distill=None))
    with pytest.raises(ValueError, match="missing option 'distill'"):
        run(compression(parent_folder, distill=None))
    # A training that cannot be is refused before the first stage, of all that are planned: 1,280 tokens are long's, but short has 640.
    late = {"short_tokens": 640, "long_tokens": 1280, "optimizer": {"lr": 1e-3}, "schedule": {"warmup_tokens": 1000}}
    with pytest.raises(ValueError, match="warmup_tokens=1000 is longer than the run of 640 tokens"):
        run(compression(parent_folder, work_dir=tmp_path / "late", distill=late))
    assert not (tmp_path / "late").exists()
    elsewhere = compression(parent_folder, work_dir=tmp_path)
    with pytest.raises(ValueError, match="scores.json is not there; run the score stage first"):
        search(elsewhere)
    save_scores(synthetic_scores(find_parent(elsewhere).model, 0), WorkFiles(tmp_path).scores)
    with pytest.raises(ValueError, match="scores another checkpoint: it names weights synthetic"):
        search(elsewhere)


def test_layouts_that_do_not_divide_after_pruning(parent_folder: Path, work: WorkFiles) -> None:
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


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from tools.minipuzzle.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "examples:" in capsys.readouterr().out
    assert main(["search", "nowhere.yaml"]) == 2
    assert "error: cannot use nowhere.yaml" in capsys.readouterr().err
    assert main(["search", "examples/minipuzzle/nemotron_h_56b.yaml", "search.memory.limit_gib=1", f"work_dir={tmp_path}"]) == 2
    assert "the smallest that the grid reaches" in capsys.readouterr().err


def rank_in(config: MiniPuzzleConfig, candidates: list[Listed]) -> list[Listed]:
    """Rank; runs on every rank."""
    from megatron_hybrid.substrate.groups import initialize, shutdown

    parent = find_parent(config)
    run_of = parent.forward_run(config.work_dir)
    substrate = initialize(run_of)
    scores = load_scores(WorkFiles(config.work_dir).scores)
    ranked = rank_candidates(run_of, substrate, parent, scores, candidates)
    shutdown(substrate)
    return ranked


def quality_of(config: MiniPuzzleConfig, candidate: Candidate, directory: Path) -> float:
    """Prune, and return the loss of the pruned model on the same text; runs on one rank."""
    from megatron_hybrid.convert.native import NativeSource
    from megatron_hybrid.substrate.groups import initialize, shutdown
    from megatron_hybrid.substrate.transformer_config import build_transformer_config
    from megatron_hybrid.tasks.frozen import load_frozen_chunks
    from tools.minipuzzle.evaluate import measure_quality
    from tools.minipuzzle.forward import StageForward
    from tools.minipuzzle.held_out import HeldOut
    from tools.minipuzzle.prune import prune

    parent = find_parent(config)
    prune(NativeSource(parent.weights), candidate, load_scores(WorkFiles(config.work_dir).scores), directory)
    run_of = parent.forward_run(config.work_dir, candidate.model(parent.model))
    substrate = initialize(run_of)
    (chunk,) = load_frozen_chunks(run_of, NativeSource(directory).path, build_transformer_config(run_of, substrate), substrate)
    batches = HeldOut(run_of, substrate, config.search.num_tokens)
    loss = measure_quality(StageForward(chunk, run_of, substrate), batches, batches.num_samples).loss
    shutdown(substrate)
    return loss


@pytest.mark.parametrize("layout", [{"tensor": 2, "pipeline": 2}, {"data": 2}], ids=["tp2-pp2", "dp2"])
def test_every_axis_is_ranked_the_same_in_every_layout(
    layout: dict, parent_folder: Path, work: WorkFiles, tmp_path: Path, run_ranks
) -> None:
    """One candidate is the parent with parts left out, the other is narrower everywhere and is cut from the checkpoint by every rank."""
    config = compression(parent_folder)
    candidates = [
        Listed(Candidate((0, 1, 2, 3, 5, 6, 7), (48, 48), 8, 12, 64), 0.0, 0.0),
        Listed(Candidate((0, 1, 2, 3, 4, 5, 6), (64, 64, 64), 4, 8, 48), 0.0, 0.0),
    ]
    world_size = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)
    of_layout = run_ranks(rank_in, world_size, compression(parent_folder, parallel=layout), candidates)
    for each in of_layout[0]:
        (expected,) = run_ranks(quality_of, 1, config, each.candidate, tmp_path / each.candidate.name)
        assert each.loss == pytest.approx(expected, rel=1e-5)
    assert all(ranked == of_layout[0] for ranked in of_layout)


def search_with_latency(config: MiniPuzzleConfig) -> int:
    """The search stage; runs on one rank, which starts its own."""
    import os

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    return search(config)


def test_latency_is_measured_and_kept_to(parent_folder: Path, work: WorkFiles, tmp_path: Path, run_ranks) -> None:
    for name in ("scores.json", "scores.safetensors"):
        (tmp_path / name).write_bytes((work.work_dir / name).read_bytes())
    options = {"ffn_hidden_sizes": [48, 96], "num_tokens": 640, "num_evaluated": 1, "solver": False}
    config = compression(parent_folder, work_dir=tmp_path, search={**options, "latency": {"limit_ms": 1e4, "context_tokens": 64}})
    assert run_ranks(search_with_latency, 1, config) == [0]
    latency = load_latency(WorkFiles(tmp_path).latency)
    (times,) = latency.times
    assert latency.context_tokens == 64 and min(times.fixed, times.attention, times.mamba, times.mlp(96)) > 0
    listed = load_candidates(find_parent(config))
    whole = max(listed, key=lambda each: (len(each.candidate.layers), each.candidate.ffn_hidden_sizes))
    expected = times.fixed + 3 * times.mamba + 2 * times.attention + 3 * times.mlp(48)
    assert whole.latency_ms == pytest.approx(expected)
    # Another limit is no other measurement; this process could not take one.
    latency = {"limit_ms": 0.5 * times.fixed, "context_tokens": 64}
    tight = compression(parent_folder, work_dir=tmp_path, search={**options, "latency": latency})
    with pytest.raises(ValueError, match=r"nothing fits search.latency.limit_ms=\S+: the fastest that the grid reaches takes"):
        search(tight)
    longer = compression(parent_folder, work_dir=tmp_path, search={**options, "latency": {"limit_ms": 1e4, "context_tokens": 32}})
    assert run_ranks(search_with_latency, 1, longer) == [0]
    assert load_latency(WorkFiles(tmp_path).latency).context_tokens == 32
