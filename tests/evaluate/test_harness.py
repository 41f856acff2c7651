"""The harness's own tasks code over our model: scores are those of a whole forward pass, texts those of the engine. No hub."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from megatron_hybrid.__main__ import main
from megatron_hybrid.config import RunConfig
from megatron_hybrid.evaluate.harness import HarnessModel
from megatron_hybrid.generate.companions import Companions
from megatron_hybrid.generate.engine import Engine, Start
from megatron_hybrid.generate.load import LanguageModel
from megatron_hybrid.generate.sampling import Sampling
from megatron_hybrid.generate.session import Session
from megatron_hybrid.model.hybrid import HybridModel
from tests.generate.models import as_ours, generate, run_of, small_model, word_tokenizer
from tests.generate.saved import save_run
from tests.runs import EOD_ID, VOCAB_SIZE

MAX_LENGTH = 40
TOKENIZER = as_ours(word_tokenizer())


def instance(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def words(tokens: list[int]) -> str:
    return " ".join(f"t{token}" for token in tokens)


def log_probabilities(model: HybridModel, tokens: list[int], count: int) -> tuple[float, bool]:
    """Of the last tokens of a sequence, from one forward pass."""
    with torch.no_grad():
        log_probability_LV = model(torch.tensor([tokens[:-1]]))[0, -count:].log_softmax(-1)
    target_L1 = torch.tensor(tokens[-count:])[:, None]
    return log_probability_LV.gather(1, target_L1).sum().item(), bool((log_probability_LV.argmax(-1) == target_L1[:, 0]).all())


def answers(run: RunConfig) -> dict[str, Any]:
    model, _ = small_model(run)
    engine = Engine(model, max_batch_size=3, max_length=MAX_LENGTH, vocab_size=VOCAB_SIZE, prefill_tokens=128)
    template = "{% for message in messages %}<|endoftext|> {{ message.content }} {% endfor %}{% if add_generation_prompt %}t9{% endif %}"
    companions = Companions((EOD_ID,), frozenset({EOD_ID}), template, {})
    harness = HarnessModel(Session(LanguageModel(model, TOKENIZER, companions, Path("nowhere")), engine, 0))
    greedy = generate(engine, [Start([EOD_ID, 5, 6], Sampling(temperature=0.0), 0)], 2)[0]

    pairs = [([5, 6, 7], [8, 9]), ([5, 6], greedy), ([], [3, 4, 5]), (list(range(1, 60)), [7]), ([9], list(range(1, 31)))]
    asked = [instance("loglikelihood", words(context), (" " if context else "") + words(new)) for context, new in pairs]
    expected = []
    for context, new in pairs:
        sequence = [EOD_ID, *context, *new][-(MAX_LENGTH + 1) :]
        expected.append(log_probabilities(model, sequence, len(new)))
    report: dict[str, Any] = {"scores": list(zip(harness.loglikelihood(asked, disable_tqdm=True), expected, strict=True))}

    long = torch.randint(1, VOCAB_SIZE, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    whole = log_probabilities(model, [EOD_ID, 5, 6, 7], 3)[0]
    # Windows of 40: the first from the prefix token on, each later one with the 40 tokens before its last for a context.
    windows = [([EOD_ID, *long[:40]], 40), (long[39:80], 40), (long[59:100], 20)]
    rolled = sum(log_probabilities(model, tokens, count)[0] for tokens, count in windows)
    asked = [instance("loglikelihood_rolling", words(tokens)) for tokens in ([5, 6, 7], long)]
    report["rolling"] = (harness.loglikelihood_rolling(asked, disable_tqdm=True), [whole, rolled])

    texts = generate(engine, [Start([EOD_ID, 5, 6], Sampling(temperature=0.0), 0)], 6)[0]
    stop = f"t{texts[3]}"
    settings = [{"max_gen_toks": 6}, {"max_gen_toks": 6, "until": [stop]}, {"max_gen_toks": 6, "temperature": 0.7, "do_sample": False}]
    settings += [{"max_gen_toks": 6, "temperature": 1.0, "do_sample": True, "seed": 3}, {"max_gen_toks": 6, "temperature": None}]
    report["until"] = (
        harness.generate_until([instance("generate_until", "t5 t6", each) for each in settings], disable_tqdm=True),
        words(texts),
        stop,
        words(generate(engine, [Start([EOD_ID, 5, 6], Sampling(), 3 + 3)], 6)[0]),
    )
    with pytest.raises(ValueError, match="num_beams"):
        harness.generate_until([instance("generate_until", "t5", {"num_beams": 4})])
    chat = harness.apply_chat_template([{"role": "user", "content": "t5"}, {"role": "assistant", "content": "t6"}])
    report["chat"] = chat, harness.tok_encode(chat)
    return report


def test_the_three_questions_get_the_models_answers(tmp_path: Path, run_ranks) -> None:
    (report,) = run_ranks(answers, 1, run_of(tmp_path))
    for (log_probability, is_greedy), (expected, was_greedy) in report["scores"]:
        assert log_probability == pytest.approx(expected, rel=1e-5) and is_greedy == was_greedy
    assert [is_greedy for (_, is_greedy), _ in report["scores"]][1]
    rolled, expected = report["rolling"]
    assert rolled == pytest.approx(expected, rel=1e-5)
    (plain, stopped, unsampled, sampled, untempered), greedy, stop, drawn = report["until"]
    assert plain.split() == greedy.split() == unsampled.split() == untempered.split()
    assert stopped.split() == greedy.split(stop)[0].split()
    assert sampled.split() == drawn.split() != greedy.split()
    assert report["chat"] == ("<|endoftext|> t5 <|endoftext|> t6 t9", [EOD_ID, 5, EOD_ID, 6, 9])


def write_tasks(folder: Path) -> list[Path]:
    """Two tasks in the harness's format over documents of their own: choices, and perplexity."""
    documents = [{"question": f"t{number} t{number + 1}", "choices": ["t7", "t8 t9"], "answer": number % 2} for number in range(1, 7)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    source = f"  data_files: {{test: {folder / 'documents.jsonl'}}}\n  cache_dir: {folder}\n"
    data = f"dataset_path: json\ndataset_kwargs:\n{source}test_split: test\n"
    (folder / "choices.yaml").write_text(
        f"task: choices\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    (folder / "perplexity.yaml").write_text(
        f"task: perplexity\n{data}output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{question}}}}'\n"
        "metric_list: [{metric: word_perplexity}]\n"
    )
    return [folder / "choices.yaml", folder / "perplexity.yaml"]


def evaluate(*arguments: str) -> tuple[int, str]:
    """Exit code and stdout of the command, on a rank."""
    out = io.StringIO()
    with redirect_stdout(out):
        code = main(["evaluate", *arguments])
    return code, out.getvalue()


def test_the_command_runs_tasks_from_files(tmp_path: Path, run_ranks) -> None:
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    run_dir, output = save_run(tmp_path, tmp_path / "tokenizer.json", run_ranks), tmp_path / "out.json"
    options = ["--max-length", "64", "--bootstrap-iters", "0", "--output", str(output), "--tasks", *map(str, write_tasks(tmp_path))]
    ((code, table),) = run_ranks(evaluate, 1, str(run_dir), *options)
    assert code == 0
    results = json.loads(output.read_text())["results"]
    assert 0 <= results["choices"]["acc,none"] <= 1 and results["perplexity"]["word_perplexity,none"] > 1
    assert "|choices" in table and "|perplexity" in table
