"""The run directory says how its contents came about: resolved configuration, code, environment, and every start of the run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable

from torch import distributed

from megatron_hybrid.config import RunConfig, dump_config
from megatron_hybrid.config.run_directory import CONFIG_NAME, STARTS_NAME, tokenizer_copy
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.environment import describe_environment


def prepare_run_directory(run: RunConfig, substrate: Substrate) -> None:
    """Make the directory and write ``config.yaml`` (the newest start's), one line more in ``starts.jsonl``, and a copy of the tokenizer;
    collective.

    Raises:
        ValueError: the directory cannot be made or written.
    """
    _on_first_rank(run, substrate, lambda: (_write(run, substrate), _keep_tokenizer(run)))


def prepare_plain_directory(run: RunConfig, substrate: Substrate) -> None:
    """``prepare_run_directory`` for a run that has no tokenizer."""
    _on_first_rank(run, substrate, lambda: _write(run, substrate))


def _on_first_rank(run: RunConfig, substrate: Substrate, write: Callable[[], object]) -> None:
    problem = [None]
    if substrate.rank == 0:
        try:
            write()
        except OSError as error:
            problem = [f"run_dir={run.run_dir} cannot be used: {error.strerror or error}"]
    distributed.broadcast_object_list(problem, src=0, group=substrate.control_group)
    if problem[0] is not None:
        raise ValueError(problem[0])


def _write(run: RunConfig, substrate: Substrate) -> None:
    run.run_dir.mkdir(parents=True, exist_ok=True)
    text = dump_config(run)
    replacement = run.run_dir / f"{CONFIG_NAME}.partial"
    replacement.write_text(text)
    replacement.replace(run.run_dir / CONFIG_NAME)
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "world_size": substrate.world_size,
        "hosts": substrate.hosts,
        "config": run.model_dump(mode="json"),
        "environment": describe_environment(substrate.device),
    }
    with (run.run_dir / STARTS_NAME).open("a") as file:
        file.write(json.dumps(start) + "\n")


def _keep_tokenizer(run: RunConfig) -> None:
    if run.data.tokenizer is None:
        return
    original, copy = run.data.tokenizer.path, tokenizer_copy(run.data.tokenizer, run.run_dir)
    if copy.exists() and copy.samefile(original):
        return
    if original.is_dir():
        shutil.copytree(original, copy, dirs_exist_ok=True)
    else:
        shutil.copy2(original, copy)
