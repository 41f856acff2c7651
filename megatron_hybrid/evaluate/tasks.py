"""The harness's tasks by name or from YAML files, and what is wrong with them in one line, before there is a model to ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from megatron_hybrid.config.errors import nearest
from megatron_hybrid.evaluate.harness import check_settings


@dataclass(frozen=True)
class Tasks:
    """What the harness evaluates, with its documents."""

    items: list[Task | Group]
    manager: TaskManager
    """Knows the groups that they are of."""


def load_tasks(names: Sequence[str]) -> Tasks:
    """Make the tasks, and read their documents.

    Args:
        names: that the harness knows, or YAML files.

    Raises:
        ValueError: there is no such task, or its file is none, or it asks for settings that there are not.
        OSError: its documents could not be fetched.
    """
    files = {name: Path(name).resolve() for name in names if name.endswith((".yaml", ".yml"))}
    folders = sorted({str(file.parent) for file in files.values()})
    # The harness's own thousands of task files take a while to look through.
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(names))
    items: list[Task | Group] = []
    for name in names:
        if name not in files and name not in manager.all_tasks:
            raise ValueError(f"the harness has no task {name!r}{nearest(name, manager.all_tasks)}; give a task's name or a YAML file")
        try:
            loaded = manager.load([str(files.get(name, name))])
        except OSError as error:
            # A task file that names a missing file is the user's to mend; a hub that does not answer is not.
            if isinstance(error, FileNotFoundError):
                raise ValueError(f"task {name}: {_in_one_line(error)}") from error
            raise
        # Whatever else a task file leads the harness and its libraries into.
        except Exception as error:
            advice = "a task file needs at least task, dataset_path, a split and output_type"
            raise ValueError(f"task {name} cannot be used: {type(error).__name__}: {_in_one_line(error)}; {advice}") from error
        for task in loaded["tasks"].values():
            if task.OUTPUT_TYPE == "generate_until":
                check_settings(dict(task.config.generation_kwargs or {}))
        # The first group is the one that was asked for, the others are in it.
        items += list(loaded["groups"].values())[:1] or loaded["tasks"].values()
    return Tasks(items, manager)


def _in_one_line(error: Exception) -> str:
    # A KeyError's text is its key in quotes.
    return " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
