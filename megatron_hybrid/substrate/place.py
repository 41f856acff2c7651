"""Which rank this process is, read from what torchrun or srun put into the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

_FIRST_SLURM_PORT = 15000
_NUM_SLURM_PORTS = 15000


@dataclass(frozen=True)
class Place:
    """One rank's place in the job, and where its ranks meet."""

    launcher: Literal["plain", "torchrun", "slurm"]
    """What started this process. plain: nothing did, so it is the only rank."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_host: str = "localhost"
    master_port: int = 0
    hosts_store: bool = True
    """Whether this rank serves the key-value store that the ranks meet at."""
    attempt: str = "0"
    """Separates the keys of successive runs on one store (torchrun's restarts)."""

    def as_client(self) -> Place:
        """The same place, for one more connection to a store that is already served."""
        return replace(self, hosts_store=False)


def place_from_environment(environment: Mapping[str, str]) -> Place:
    """Return the place that torchrun's variables give, else srun's, else that of a single plain process.

    A SLURM job step of one task is a plain process: nothing is lost, and an interactive shell works like any other.

    Raises:
        ValueError: variables that belong together are missing or no numbers.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _torchrun_place(environment)
    if "SLURM_PROCID" in environment and _slurm_world_size(environment) > 1:
        return _slurm_place(environment)
    return Place("plain")


def local_rank_environment(rank: int, world_size: int, store_port: int, attempt: str = "0") -> dict[str, str]:
    """Return torchrun's variables for a rank on this host whose store another process serves at ``store_port``."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store_port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": attempt,
    }


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list, without scontrol, which containers lack.

    >>> first_host("gpu[003-006,9],login1"), first_host("rack2-node[7]-ib"), first_host("alone")
    ('gpu003', 'rack2-node7-ib', 'alone')

    Raises:
        ValueError: the text is no node list.
    """
    match = re.match(r"((?:[^\[\],\s]|\[\d[^\[\]]*\])+)(?:,|$)", nodelist.strip())
    if match is None:
        raise ValueError(f"expected a SLURM node list such as 'gpu[003-006],login1', got {nodelist!r}")
    return re.sub(r"\[(\d+)[^\[\]]*\]", r"\1", match.group(1))


def _torchrun_place(environment: Mapping[str, str]) -> Place:
    rank = _number(environment, "RANK")
    world_size = _number(environment, "WORLD_SIZE")
    return Place(
        launcher="torchrun",
        rank=rank,
        world_size=world_size,
        local_rank=_number(environment, "LOCAL_RANK"),
        master_host=_text(environment, "MASTER_ADDR"),
        master_port=_number(environment, "MASTER_PORT"),
        # torchrun's agent serves the store itself, and says so by this variable.
        hosts_store=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _slurm_place(environment: Mapping[str, str]) -> Place:
    rank = _number(environment, "SLURM_PROCID")
    nodelist = environment.get("SLURM_STEP_NODELIST") or _text(environment, "SLURM_JOB_NODELIST")
    if "MASTER_PORT" in environment:
        port = _number(environment, "MASTER_PORT")
    else:
        # Below Linux's ephemeral range; the same for every rank of a step, and different for steps of one job.
        job = _number(environment, "SLURM_JOB_ID") + int(environment.get("SLURM_STEP_ID", 0))
        port = _FIRST_SLURM_PORT + job % _NUM_SLURM_PORTS
    return Place(
        launcher="slurm",
        rank=rank,
        world_size=_slurm_world_size(environment),
        local_rank=_number(environment, "SLURM_LOCALID"),
        master_host=environment.get("MASTER_ADDR") or first_host(nodelist),
        master_port=port,
        hosts_store=rank == 0,
    )


def _slurm_world_size(environment: Mapping[str, str]) -> int:
    # srun states the tasks of its step. The job's number, SLURM_NTASKS, stands in a batch script too, where nothing was started yet.
    return int(environment.get("SLURM_STEP_NUM_TASKS", 1))


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise ValueError(f"{name} is not set in the environment; start the ranks with torchrun or srun, or set it")
    return environment[name]


def _number(environment: Mapping[str, str], name: str) -> int:
    text = _text(environment, name)
    if not text.isdigit():
        raise ValueError(f"{name}={text!r} in the environment is no whole number")
    return int(text)
