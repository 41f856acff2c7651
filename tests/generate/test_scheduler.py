"""Requests that wait, run, stop and are cancelled get what they would get alone."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.config import RunConfig
from megatron_hybrid.generate.engine import Engine
from megatron_hybrid.generate.ranks import Leader, follow
from megatron_hybrid.generate.sampling import Sampling
from megatron_hybrid.generate.scheduler import Event, Request, Scheduler
from megatron_hybrid.generate.stages import Stages
from megatron_hybrid.model.hybrid import HybridModel
from tests.generate.models import as_ours, random_prompts, run_of, small_model, word_tokenizer
from tests.runs import VOCAB_SIZE

TOKENIZER = as_ours(word_tokenizer())
LENGTHS = (90, 3, 40, 1, 7, 64, 12, 2)


def requests_of(**options: Any) -> list[Request]:
    """Eight requests of many lengths, greedy and drawn."""
    settings = [Sampling(temperature=0.0), Sampling(), Sampling(top_p=0.8), Sampling(repetition_penalty=1.2)]
    return [
        Request(**{"key": key, "prompt": prompt, "max_new_tokens": 3 + 2 * key, "sampling": settings[key % 4], "seed": key, **options})
        for key, prompt in enumerate(random_prompts(*LENGTHS))
    ]


def word_of(token: int) -> str:
    """As the tokenizer writes it."""
    return TOKENIZER.decode([token]) or "<|endoftext|>"


def new_scheduler(model: HybridModel, *, slots: int = 3, steps_ahead: int = 0) -> Scheduler:
    engine = Engine(model, max_batch_size=slots, max_length=120, vocab_size=VOCAB_SIZE, prefill_tokens=128)
    return Scheduler(engine, TOKENIZER, steps_ahead=steps_ahead)


def run(scheduler: Scheduler, requests: list[Request]) -> dict[Any, list[Event]]:
    """All events by request."""
    for request in requests:
        scheduler.submit(request)
    events = defaultdict(list)
    while scheduler.has_work:
        for event in scheduler.advance():
            events[event.key].append(event)
    assert scheduler.advance() == [] and scheduler.num_waiting == 0
    return dict(events)


def in_many_ways(run_config: RunConfig) -> dict[str, Any]:
    model, _ = small_model(run_config)
    requests = requests_of()
    report: dict[str, Any] = {"alone": {each.key: run(new_scheduler(model, slots=1), [each])[each.key] for each in requests}}
    for slots in (1, 3, 8):
        for steps_ahead in (0, 3):
            report[f"{slots} slots, {steps_ahead} ahead"] = run(new_scheduler(model, slots=slots, steps_ahead=steps_ahead), requests)
    return report


def test_events_do_not_depend_on_slots_or_on_steps_ahead(tmp_path: Path, run_ranks) -> None:
    (report,) = run_ranks(in_many_ways, 1, run_of(tmp_path))
    alone = report.pop("alone")
    for key, events in alone.items():
        assert len(events) == 3 + 2 * key and [event.ending for event in events] == [None] * (len(events) - 1) + ["length"]
        words = [word_of(event.token) for event in events]
        assert "".join(event.text for event in events).split() == words
    for way, events in report.items():
        assert events == alone, way


def with_stops(run_config: RunConfig) -> dict[str, Any]:
    model, _ = small_model(run_config)
    greedy = {"sampling": Sampling(temperature=0.0), "max_new_tokens": 16}
    plain = run(new_scheduler(model), requests_of(**greedy))
    tokens = {key: [event.token for event in events] for key, events in plain.items()}
    report: dict[str, Any] = {"plain": tokens}
    for steps_ahead in (0, 3):
        by_token = [Request(**{**vars(each), "stop_tokens": frozenset({tokens[each.key][5]})}) for each in requests_of(**greedy)]
        by_text = [Request(**{**vars(each), "stop": (f"t{tokens[each.key][4]} t{tokens[each.key][5]}",)}) for each in requests_of(**greedy)]
        report[f"token {steps_ahead}"] = run(new_scheduler(model, steps_ahead=steps_ahead), by_token)
        report[f"text {steps_ahead}"] = run(new_scheduler(model, steps_ahead=steps_ahead), by_text)
    return report


@pytest.mark.parametrize("steps_ahead", [0, 3])
def test_stop_tokens_and_stop_strings_end_a_text_and_are_not_shown(steps_ahead: int, tmp_path: Path, run_ranks) -> None:
    (report,) = run_ranks(with_stops, 1, run_of(tmp_path))
    for key, tokens in report["plain"].items():
        words = [f"t{token}" for token in tokens]
        events = report[f"token {steps_ahead}"][key]
        end = tokens.index(tokens[5])
        assert [event.token for event in events] == tokens[: end + 1] and events[-1].ending == "stop"
        assert "".join(event.text for event in events).split() == words[:end]
        text = "".join(event.text for event in report[f"text {steps_ahead}"][key])
        shown = " ".join(words).split(f"t{tokens[4]} t{tokens[5]}")[0]
        assert text.split() == shown.split() and report[f"text {steps_ahead}"][key][-1].ending == "stop"


def with_cancellations(run_config: RunConfig) -> dict[str, Any]:
    model, _ = small_model(run_config)
    requests = requests_of()
    alone = {each.key: run(new_scheduler(model, slots=1), [each])[each.key] for each in requests}
    scheduler, events = new_scheduler(model, slots=2, steps_ahead=2), defaultdict(list)
    for request in requests:
        scheduler.submit(request)
    # 0 is being read, 7 waits; 1 has begun by its third round.
    scheduler.advance()
    scheduler.cancel(0)
    scheduler.cancel(7)
    rounds = 0
    while scheduler.has_work:
        for event in scheduler.advance():
            events[event.key].append(event)
        rounds += 1
        if rounds == 3:
            scheduler.cancel(1)
            cancelled_after = len(events[1])
    scheduler.cancel(2)
    return {"alone": alone, "events": dict(events), "cancelled after": cancelled_after}


def test_a_cancelled_request_says_no_more_and_disturbs_nobody(tmp_path: Path, run_ranks) -> None:
    (report,) = run_ranks(with_cancellations, 1, run_of(tmp_path))
    alone, events = report["alone"], report["events"]
    assert events.keys().isdisjoint({0, 7})
    assert len(events.pop(1)) == report["cancelled after"] < len(alone[1])
    assert events == {key: alone[key] for key in range(2, 7)}


def failures(run_config: RunConfig) -> dict[str, Any]:
    model, _ = small_model(run_config)
    scheduler, report = new_scheduler(model), {}
    for name, options in (("long", {"max_new_tokens": 31}), ("none", {"max_new_tokens": 0})):
        with pytest.raises(ValueError) as caught:
            scheduler.submit(requests_of(**options)[0])
        report[name] = str(caught.value)
    assert not scheduler.has_work
    model.output_layer.weight.data.fill_(float("nan"))
    report["events"] = run(scheduler, requests_of()[:2])
    return report


def test_what_cannot_be_met_is_refused_and_a_diverged_model_is_told(tmp_path: Path, run_ranks) -> None:
    (report,) = run_ranks(failures, 1, run_of(tmp_path))
    assert "90 prompt tokens and 31 new ones are 121, but there is room for 120" in report["long"]
    assert "at least one new token" in report["none"]
    for events in report["events"].values():
        assert len(events) == 1 and "logits are not finite" in events[0].error


def led(run_config: RunConfig) -> dict[Any, list[Event]] | None:
    """The first rank schedules, the others follow."""
    model, substrate = small_model(run_config)
    engine = Engine(model, max_batch_size=3, max_length=120, vocab_size=VOCAB_SIZE, prefill_tokens=128, stages=Stages.of(substrate))
    if substrate.rank > 0:
        follow(engine, substrate.control_group)
        return None
    leader = Leader(engine, substrate.control_group)
    leader.keep_alive()
    events = run(Scheduler(leader, TOKENIZER, steps_ahead=0), requests_of())
    leader.dismiss()
    return events


def test_ranks_follow_the_first(tmp_path: Path, run_ranks) -> None:
    (alone,) = run_ranks(led, 1, run_of(tmp_path))
    led_events, *followers = run_ranks(led, 2, run_of(tmp_path, parallel={"pipeline": 2}))
    assert led_events == alone and followers == [None]
