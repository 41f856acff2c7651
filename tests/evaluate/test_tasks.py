"""Tasks are looked at before there is a model; what is wrong with one is a line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hybrid.evaluate.harness import check_settings
from megatron_hybrid.evaluate.tasks import load_tasks

DOCUMENTS = '{"question": "t1 t2", "answer": "t3"}\n'
HEAD = "task: greetings\ndataset_path: json\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"


def write_task(folder: Path, *lines: str, head: str = HEAD) -> str:
    """A task file of the harness over one document."""
    (folder / "documents.jsonl").write_text(DOCUMENTS)
    data = f"dataset_kwargs: {{data_files: {{test: {folder / 'documents.jsonl'}}}, cache_dir: {folder}}}\n"
    (folder / "task.yaml").write_text(head + data + "\n".join(lines) + "\n")
    return str(folder / "task.yaml")


def test_a_sound_task_has_its_documents(tmp_path: Path) -> None:
    (task,) = load_tasks([write_task(tmp_path, "output_type: generate_until", "generation_kwargs: {until: [t9], max_gen_toks: 4}")]).items
    assert task.task_name == "greetings" and len(task.eval_docs) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [x", r"cannot be used: ParserError: while parsing a flow sequence"),
        ("task: alone\n", r"cannot be used: .*dataset_path"),
        ("just words", r"cannot be used"),
        (HEAD.replace("json", "/nowhere/data"), r"task .*task\.yaml"),
        (HEAD + "output_type: telepathy\n", r"cannot be used: .*telepathy"),
    ],
)
def test_a_task_file_that_is_none_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_tasks([str(tmp_path / "task.yaml")])
    assert "task.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="the harness has no task 'hellaswga'; did you mean 'hellaswag'"):
        load_tasks(["hellaswga"])


def test_settings_that_there_are_not_are_refused_with_the_task(tmp_path: Path) -> None:
    task = write_task(tmp_path, "output_type: generate_until", "generation_kwargs: {until: [t9], num_beams: 4}")
    with pytest.raises(ValueError, match="generation_kwargs have num_beams"):
        load_tasks([task])


def test_a_total_length_is_not_silently_left_out() -> None:
    with pytest.raises(ValueError, match="generation_kwargs have max_length"):
        check_settings({"max_length": 20})
