"""Where the ranks meet before any group exists: one store, and what every rank says about itself."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from megatron_hybrid.config.schema import RunConfig
from megatron_hybrid.substrate.place import Place

LONGEST_WAIT_S = 300.0
"""Ranks that are not there after this long (or after runtime.timeout_s, if that is shorter) will not come."""


class RendezvousError(RuntimeError):
    """Some rank did not come in time."""


@dataclass(frozen=True)
class RankReport:
    """What one rank tells the others before groups are built."""

    host: str
    backend: Literal["gloo", "nccl"]
    gpu: str
    """Identity of the GPU this rank would use; empty on a CPU."""
    cpus: tuple[int, ...]
    """Cores this process may run on."""
    config_digest: str
    error: str
    """Why this rank cannot run; empty if it can."""


def open_store(place: Place, timeout_s: float) -> dist.Store:
    """Return the store of all ranks, connected.

    Raises:
        RendezvousError: its host did not answer in time.
    """
    if place.world_size == 1:
        return dist.HashStore()
    try:
        store = dist.TCPStore(
            place.master_host,
            place.master_port,
            is_master=place.hosts_store,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except (dist.DistError, RuntimeError) as error:
        action = "serve" if place.hosts_store else "reach"
        raise RendezvousError(
            f"rank {place.rank} of {place.world_size} could not {action} the rendezvous at {place.master_host}:{place.master_port} "
            f"within {timeout_s:g} s ({place.launcher}): check that rank 0 runs, that every rank has the same MASTER_ADDR and MASTER_PORT, "
            f"and that the port is free and open ({_first_line(error)})"
        ) from None
    return attempt_store(store, place.attempt)


def attempt_store(store: dist.Store, attempt: str) -> dist.Store:
    """Return the part of a store that belongs to one attempt of a run."""
    return dist.PrefixStore(f"attempt_{attempt}", store)


def exchange_reports(store: dist.Store, place: Place, report: RankReport, timeout_s: float) -> tuple[RankReport, ...]:
    """Give this rank's report and return those of all ranks, by rank.

    Raises:
        RendezvousError: a rank's report did not come in time; the message names the missing ranks.
    """
    keys = [f"report/{rank}" for rank in range(place.world_size)]
    store.set(keys[place.rank], json.dumps(asdict(report)))
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except (dist.DistError, RuntimeError):
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise RendezvousError(
            f"{len(missing)} of {place.world_size} ranks did not come to the rendezvous at {place.master_host}:{place.master_port} within "
            f"{timeout_s:g} s: missing ranks {_shortened(missing)}; look for their errors, and check that the launcher "
            f"({place.launcher}) started {place.world_size} processes"
        ) from None
    reports = (json.loads(text) for text in store.multi_get(keys))
    return tuple(RankReport(**{**fields, "cpus": tuple(fields["cpus"])}) for fields in reports)


def make_report(config: RunConfig, place: Place) -> RankReport:
    """Return this rank's report: its host, device and cores, and what stands in its way."""
    cuda = torch.cuda.is_available()
    wanted = config.runtime.device
    error = ""
    if wanted == "cuda" and not cuda:
        error = "runtime.device=cuda, but torch finds no CUDA device here; use runtime.device=auto or cpu"
    elif wanted == "cpu" and cuda:
        error = "runtime.device=cpu, but torch finds CUDA here, which megatron-core then uses; set CUDA_VISIBLE_DEVICES= (empty) to hide it"
    return RankReport(
        host=socket.gethostname(),
        backend="nccl" if cuda else "gloo",
        gpu=str(torch.cuda.get_device_properties(device_index(place)).uuid) if cuda else "",
        cpus=tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else tuple(range(os.cpu_count() or 1)),
        config_digest=hashlib.sha256(config.model_dump_json().encode()).hexdigest(),
        error=error,
    )


def device_index(place: Place) -> int:
    """Return the GPU this rank would use: its local rank, or the last one visible (srun may show each task only its own)."""
    return min(place.local_rank, torch.cuda.device_count() - 1)


def check_reports(reports: Sequence[RankReport]) -> None:
    """Refuse ranks that cannot run together. Every rank sees the same reports, so all of them raise the same error.

    Raises:
        ValueError: a rank reported an error, configurations or backends differ, or ranks would share a GPU.
    """
    for rank, report in enumerate(reports):
        if report.error:
            raise ValueError(report.error if len(reports) == 1 else f"rank {rank} on {report.host}: {report.error}")
        if report.config_digest != reports[0].config_digest:
            raise ValueError(f"rank {rank} on {report.host} has another configuration than rank 0; start all ranks with the same command")
        if report.backend != reports[0].backend:
            raise ValueError(
                f"rank {rank} on {report.host} would use {report.backend}, rank 0 on {reports[0].host} {reports[0].backend}; "
                "use hosts that all have CUDA, or none"
            )
    if reports[0].backend == "nccl":
        ranks_per_host = Counter(report.host for report in reports)
        gpus_per_host = Counter(host for host, _ in {(report.host, report.gpu) for report in reports})
        for host, num_ranks in ranks_per_host.items():
            if gpus_per_host[host] < num_ranks:
                raise ValueError(
                    f"{num_ranks} ranks on {host} share {gpus_per_host[host]} GPU(s), NCCL needs one per rank; "
                    "start at most one rank per GPU"
                )


def threads_per_rank(reports: Sequence[RankReport], rank: int) -> int:
    """Return this rank's share of its cores: those it may use, divided among the ranks of its host that may use them too."""
    mine = reports[rank]
    sharing = sum(report.host == mine.host and not set(report.cpus).isdisjoint(mine.cpus) for report in reports)
    return max(1, len(mine.cpus) // sharing)


def wait_s(config: RunConfig) -> float:
    """Return how long to wait for the other ranks."""
    return min(config.runtime.timeout_s, LONGEST_WAIT_S)


def _shortened(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16]))
    return shown if len(ranks) <= 16 else f"{shown} and {len(ranks) - 16} more"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
