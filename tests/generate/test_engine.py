"""Sequences in slots: each gets what it would get alone, whenever it starts and whoever is beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.config import RunConfig
from megatron_hybrid.generate.engine import Engine, Start
from megatron_hybrid.generate.graphs import batch_sizes
from megatron_hybrid.generate.sampling import NOT_FINITE, Sampling
from megatron_hybrid.generate.stages import Stages
from megatron_hybrid.model.hybrid import HybridModel
from tests.generate.models import generate, random_prompts, run_of, small_model
from tests.runs import VOCAB_SIZE

GREEDY = Sampling(temperature=0.0)
SETTINGS = [
    GREEDY,
    Sampling(),
    Sampling(temperature=0.8, top_k=20),
    Sampling(top_p=0.8),
    Sampling(min_p=0.1, repetition_penalty=1.4),
    Sampling(temperature=0.0, repetition_penalty=1.4),
]
NUM_NEW = 14


def new_engine(model: HybridModel, **options: Any) -> Engine:
    return Engine(model, **{"max_batch_size": 8, "max_length": 200, "vocab_size": VOCAB_SIZE, "prefill_tokens": 256, **options})


def in_every_company(run: RunConfig) -> dict[str, Any]:
    """Tokens of the same six starts alone, together, and joining one after another in whatever slots are free."""
    model, _ = small_model(run)
    engine = new_engine(model)
    prompts = random_prompts(150, 64, 33, 5, 2, 1)
    starts = [Start(prompt, sampling, seed) for seed, (prompt, sampling) in enumerate(zip(prompts, SETTINGS))]
    report: dict[str, Any] = {
        "alone": [generate(engine, [start], NUM_NEW)[0] for start in starts],
        "together": generate(engine, starts, NUM_NEW),
        "shortest first": generate(engine, starts[::-1], NUM_NEW)[::-1],
        "other slots": generate(engine, starts, NUM_NEW, first=2),
        "other pieces": generate(new_engine(model, prefill_tokens=64), starts, NUM_NEW),
    }
    joined: dict[int, list[int]] = {}
    slots = [3, 0, 5, 1, 4, 2]
    for number, start in enumerate(starts):
        joined[number] = engine.prefill(slots[number], [start])
        for _ in range(2):
            tokens = engine.step().fetch()
            for each, so_far in joined.items():
                if len(so_far) < NUM_NEW:
                    so_far.append(tokens[slots[each]])
    while any(len(so_far) < NUM_NEW for so_far in joined.values()):
        tokens = engine.step().fetch()
        for each, so_far in joined.items():
            if len(so_far) < NUM_NEW:
                so_far.append(tokens[slots[each]])
    report["joining"] = list(joined.values())
    greedy = report["alone"][0]
    with torch.no_grad():
        whole = model(torch.tensor([prompts[0] + greedy]))[0, len(prompts[0]) - 1 : -1].argmax(-1).tolist()
    report["whole"] = whole
    return report


def test_a_sequence_does_not_depend_on_its_company(tmp_path: Path, run_ranks) -> None:
    (report,) = run_ranks(in_every_company, 1, run_of(tmp_path))
    alone = report["alone"]
    assert alone[0] == report["whole"]
    assert all(len(set(tokens)) > 3 for tokens in alone), "the same token over and over proves little"
    for company in ("together", "shortest first", "other slots", "other pieces", "joining"):
        assert report[company] == alone, company


def on_ranks(run: RunConfig) -> dict[str, Any]:
    """The same from engines on several ranks, told the same by each."""
    model, substrate = small_model(run)
    engine = new_engine(model, stages=Stages.of(substrate))
    prompts = random_prompts(150, 33, 1)
    tokens = generate(engine, [Start(prompt, sampling, seed) for seed, (prompt, sampling) in enumerate(zip(prompts, SETTINGS))], NUM_NEW)
    return {"tokens": tokens, "scores": engine.score(prompts[:2], [149, 3])}


@pytest.mark.parametrize(
    "layout", [{"tensor": 2}, {"pipeline": 2}, pytest.param({"tensor": 2, "pipeline": 2}, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("widths", [96, (96, 40)], ids=str)
def test_every_layout_gives_the_same_tokens(layout: dict[str, int], widths: object, tmp_path: Path, run_ranks) -> None:
    (one,) = run_ranks(on_ranks, 1, run_of(tmp_path, ffn_hidden_size=widths))
    run = run_of(tmp_path, parallel=layout, ffn_hidden_size=widths)
    for other in run_ranks(on_ranks, run.parallel.model_ranks, run):
        assert other["tokens"] == one["tokens"]
        for (here, is_greedy), (there, was_greedy) in zip(other["scores"], one["scores"], strict=True):
            assert here == pytest.approx(there, rel=1e-5) and is_greedy == was_greedy


def scores(run: RunConfig) -> list[tuple[Any, Any]]:
    """Scores by the engine, and from the log-probabilities of a whole forward pass."""
    model, _ = small_model(run)
    engine = new_engine(model)
    prompts = random_prompts(150, 70, 5, 2)
    # The last two tokens of one are the most probable ones.
    prompts[2] += generate(engine, [Start(prompts[2], GREEDY, 0)], 2)[0]
    num_scored = [149, 1, 2, 1]
    expected = []
    for prompt, count in zip(prompts, num_scored):
        with torch.no_grad():
            log_probability_LV = model(torch.tensor([prompt]))[0].log_softmax(-1)
        places = range(len(prompt) - count - 1, len(prompt) - 1)
        total = sum(log_probability_LV[place, prompt[place + 1]].item() for place in places)
        expected.append((total, all(log_probability_LV[place].argmax().item() == prompt[place + 1] for place in places)))
    return list(zip(engine.score(prompts, num_scored), expected, strict=True))


def test_scores_are_those_of_the_whole_forward_pass(tmp_path: Path, run_ranks) -> None:
    (pairs,) = run_ranks(scores, 1, run_of(tmp_path))
    for score, (log_probability, is_greedy) in pairs:
        assert score.log_probability == pytest.approx(log_probability, rel=1e-5) and score.is_greedy == is_greedy
    assert [score.is_greedy for score, _ in pairs].count(True) >= 1


def forked(run: RunConfig) -> tuple[list[list[int]], list[list[int]]]:
    model, _ = small_model(run)
    engine = new_engine(model)
    (prompt,) = random_prompts(40)
    starts = [Start(prompt, Sampling(), seed) for seed in range(3)]
    (first,) = engine.prefill(0, starts[:1])
    engine.fork(0, {2: starts[1], 1: starts[2]})
    tokens = [engine.step().fetch() for _ in range(6)]
    slots = (0, 2, 1)
    together = [[first] + [step[slot] for step in tokens] for slot in slots]
    # A fork shares the first token and draws its own from then on.
    alone = [generate(engine_after(model), [Start([*prompt, first], start.sampling, start.seed)], 6)[0] for start in starts]
    return together, [[first, *each] for each in alone]


def engine_after(model: HybridModel) -> Engine:
    return new_engine(model, max_batch_size=1)


def test_a_fork_goes_on_as_if_it_had_read_the_prompt(tmp_path: Path, run_ranks) -> None:
    ((together, alone),) = run_ranks(forked, 1, run_of(tmp_path))
    assert together == alone and together[0] != together[1] != together[2]


def limits(run: RunConfig) -> dict[str, Any]:
    model, _ = small_model(run)
    engine = new_engine(model, max_length=12)
    (prompt,) = random_prompts(9)
    report: dict[str, Any] = {}
    for name, bad in (("empty", []), ("long", [*prompt, 1, 2, 3])):
        report[name] = error_of(lambda bad=bad: engine.begin(0, [Start(bad, GREEDY, 0)]))
    report["score"] = error_of(lambda: engine.score([[1, 2]], [2]))
    report["tokens"] = generate(engine, [Start(prompt, GREEDY, 0)], 4)[0]
    engine.prefill(0, [Start(prompt, GREEDY, 0)])
    for _ in range(3):
        engine.step()
    report["full"] = error_of(engine.step)
    engine.release(0)
    model.output_layer.weight.data.fill_(float("nan"))
    report["not finite"] = engine.prefill(0, [Start(prompt, Sampling(), 0)])
    return report


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def test_limits(tmp_path: Path, run_ranks) -> None:
    (report,) = run_ranks(limits, 1, run_of(tmp_path))
    assert "a prompt has 0 tokens; expected 1 to 11" in report["empty"] and "a prompt has 12 tokens" in report["long"]
    assert "cannot score 2 of 2 tokens" in report["score"]
    assert len(report["tokens"]) == 4
    assert "at its limit of 12 tokens" in report["full"]
    assert report["not finite"] == [NOT_FINITE]


def test_graph_sizes_leave_at_most_a_third_of_the_rows_idle() -> None:
    for largest in (1, 2, 3, 5, 128, 200):
        sizes = batch_sizes(largest)
        assert sizes[-1] == largest
        for size in range(1, largest + 1):
            chosen = next(each for each in sizes if each >= size)
            assert (chosen - size) / chosen <= 1 / 3, (size, chosen)
