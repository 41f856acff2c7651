"""The sum of layers' times beside a whole model's: right by construction under a made-up clock, and told in the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from tests.tools.minipuzzle.small import compression
from tools.minipuzzle.candidate import Candidate
from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.inputs import latency_inputs
from tools.minipuzzle.latency import LatencyModel, LayerTimes, save_latency
from tools.minipuzzle.parent import find_parent
from tools.minipuzzle.prediction import Prediction, compare_predictions, describe_predictions
from tools.minipuzzle.results import Results, Speed

CHILD = Candidate((0, 1, 3, 4, 5), (48, 96), 8, 12, 64)
TIMES = LayerTimes(64, 8, 12, fixed=1.0, attention=5.0, mamba=2.0, mlp_base=0.5, mlp_per_neuron=0.01)


def time_by_a_made_up_clock(folder: Path) -> tuple[LatencyModel, dict[str, float]]:
    """Layers one by one, and whole models, where every part takes as long as ``TIMES`` says; runs on one rank."""
    from megatron_hybrid.generate import step
    from megatron_hybrid.layers.attention import AttentionLayer
    from megatron_hybrid.layers.mamba import MambaLayer
    from megatron_hybrid.substrate.groups import initialize, shutdown
    from tools.minipuzzle import timing

    parent = find_parent(compression(folder))
    run = parent.timing_run(folder)
    substrate, setting = initialize(run), parent.config.search.latency.model_copy(update={"context_tokens": 16})
    elapsed_ms = [0.0]

    def run_layer(layer, hidden_BD, *_):
        known = {MambaLayer: TIMES.mamba, AttentionLayer: TIMES.attention}
        elapsed_ms[0] += known[type(layer)] if type(layer) in known else TIMES.mlp(layer.mlp.linear_fc2.weight.shape[1])
        return hidden_BD

    def logits_of(*_):
        elapsed_ms[0] += TIMES.fixed

    def time(call, *_):
        before_ms = elapsed_ms[0]
        call()
        return elapsed_ms[0] - before_ms

    patches = [(timing, "run_layer", run_layer), (step, "run_layer", run_layer), (timing, "logits_of", logits_of), (timing, "_time", time)]
    with mock.patch.multiple(timing, **{name: fake for where, name, fake in patches if where is timing}), mock.patch.object(*patches[1]):
        widths = [timing.Widths(64, 8, 12)]
        latency = timing.measure_latency(run, substrate, setting, widths, (48, 96))
        models = {"parent": parent.model, "child": CHILD.model(parent.model)}
        timed = timing.time_decoding({name: run.model_copy(update={"model": model}) for name, model in models.items()}, substrate, setting)
    shutdown(substrate)
    return latency, {name: each.decode_ms for name, each in timed.items()}


def test_the_sum_over_layers_is_the_whole_model(parent_folder: Path, run_ranks) -> None:
    ((latency, whole_ms),) = run_ranks(time_by_a_made_up_clock, 1, parent_folder)
    (times,) = latency.times
    assert vars(times) == pytest.approx(vars(TIMES))
    parent = find_parent(compression(parent_folder)).model
    assert latency.predict(parent) == pytest.approx(whole_ms["parent"])
    assert latency.predict(CHILD.model(parent)) == pytest.approx(whole_ms["child"])


def test_the_report_compares_what_was_foretold_with_what_was_measured(parent_folder: Path, tmp_path: Path) -> None:
    def parent_of(**sections):
        return find_parent(compression(parent_folder, work_dir=tmp_path, **sections))

    limited = {"ffn_hidden_sizes": [48, 96], "num_tokens": 640, "latency": {"limit_ms": 20.0}}
    parent = parent_of(search=limited)
    setting = parent.config.search.latency
    save_latency(LatencyModel("cpu", "fp32", setting.context_tokens, 1, (TIMES,), latency_inputs(parent)), WorkFiles(tmp_path).latency)
    speeds = [Speed(kind, "cpu", "fp32", setting.context_tokens, 1, ms, 1.0, None) for kind, ms in (("parent", 25.0), ("long", 16.0))]
    results = Results(winner=CHILD.name, speeds=speeds)
    found = compare_predictions(parent, results, CHILD)
    # 1 + 3 x 2 + 2 x 5 + 3 x 1.46, and 1 + 2 x 2 + 5 + 0.98 + 1.46
    assert found == {"parent": Prediction(pytest.approx(21.38), 25.0), "long": Prediction(pytest.approx(12.44), 16.0)}
    sentences = describe_predictions(found, setting.limit_ms)
    assert "child 12.440 ms predicted, 16.000 measured (-22.2 %)" in sentences[0]
    assert sentences[1] == "the child takes 16.000 ms per step, within search.latency.limit_ms=20"
    # Nothing to compare: no limit, no timing, layers on several ranks, times of another setting, widths that were not measured.
    assert compare_predictions(parent_of(), results, CHILD) == {}
    assert compare_predictions(parent, Results(winner=CHILD.name), CHILD) == {}
    assert compare_predictions(parent_of(search=limited, parallel={"tensor": 2}), results, CHILD) == {}
    longer = limited | {"latency": {"limit_ms": 20.0, "context_tokens": 32}}
    assert compare_predictions(parent_of(search=longer), results, CHILD) == {}
    assert set(compare_predictions(parent, results, replace(CHILD, mamba_num_heads=4))) == {"parent"}


@pytest.mark.parametrize("verb", ["prune", "report"])
def test_the_work_of_one_process_refuses_ranks(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from tools.minipuzzle.__main__ import main

    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    assert main([verb, "examples/minipuzzle/stdlib.yaml"]) == 2
    assert f"{verb} is the work of one process, and torchrun or srun would have every rank do it" in capsys.readouterr().err
