"""Ranks for the parallel tests: worker processes that stay up between tests, so that importing torch is paid once.

A rank's function is any module-level function; what it returns comes back pickled, by rank. It sees torchrun's environment, so
``substrate.initialize(config)`` in it joins the ranks of the same call.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_hybrid.substrate.place import local_rank_environment

DEFAULT_TIMEOUT_S = 120.0
RUNS_PER_WORKER = 20
"""megatron-core's data-parallel wrapper and autograd hold each other, so a model and its groups' threads outlive their run in a worker."""


class RankFailure(AssertionError):
    """A rank raised, died or did not come back in time; the message holds its traceback."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[Any]:
    """Run ``fn(*args)`` once on ``world_size`` fresh ranks and return their results by rank. Tests use the fixture of this name instead.

    Raises:
        RankFailure: see there.
    """
    with RankPool() as pool:
        return pool.run(fn, world_size, *args, timeout_s=timeout_s)


class RankPool:
    """Worker processes, started when first needed, that take turns as the ranks of many runs. A failed run restarts them."""

    def __init__(self) -> None:
        self._store: dist.TCPStore | None = None
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._on_cuda = False
        self._num_runs = 0

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[Any]:
        """Run ``fn(*args)`` on ranks 0 to ``world_size - 1`` and return their results by rank.

        The ranks use NCCL where the host has a GPU for each, and otherwise gloo with the GPUs hidden.

        Raises:
            RankFailure: a rank raised or died (the first one's traceback), or the ranks took longer than ``timeout_s``.
        """
        if self._num_runs % RUNS_PER_WORKER == RUNS_PER_WORKER - 1:
            self.close()
        self._start(world_size)
        assert self._store is not None
        payload = pickle.dumps((fn, args))
        for rank, (_, pipe) in enumerate(self._workers[:world_size]):
            environment = local_rank_environment(rank, world_size, self._store.port, str(self._num_runs))
            pipe.send((environment, sys.path, timeout_s, payload))
        self._num_runs += 1
        try:
            return self._collect(world_size, timeout_s)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the workers."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers.clear()
        self._store = None

    def _start(self, world_size: int) -> None:
        on_cuda = torch.cuda.device_count() >= world_size
        if on_cuda != self._on_cuda:
            self.close()
            self._on_cuda = on_cuda
        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        context = multiprocessing.get_context("spawn")
        with pytest.MonkeyPatch.context() as patch:
            if not on_cuda:
                patch.setenv("CUDA_VISIBLE_DEVICES", "")
            while len(self._workers) < world_size:
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs,))
                process.start()
                theirs.close()
                self._workers.append((process, ours))

    def _collect(self, world_size: int, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        rank_of = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:world_size])}
        # The workers dump their stacks at the limit; leave them a moment to do so.
        deadline = time.monotonic() + timeout_s + 2.0
        while len(results) < world_size:
            waiting = [pipe for pipe, rank in rank_of.items() if rank not in results]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = sorted(rank_of[pipe] for pipe in waiting)
                raise RankFailure(f"ranks {missing} of {world_size} did not come back within {timeout_s:g} s; their stacks are on stderr")
            failures = []
            for pipe in ready:
                try:
                    results[rank_of[pipe]] = self._receive(rank_of[pipe], pipe)
                except RankFailure as failure:
                    failures.append(str(failure))
            if failures:
                raise RankFailure("\n".join(failures))
        return [results[rank] for rank in range(world_size)]

    def _receive(self, rank: int, pipe: Connection) -> Any:
        try:
            succeeded, payload = pipe.recv()
        except EOFError:
            process = self._workers[rank][0]
            process.join(5.0)
            raise RankFailure(f"rank {rank} died with exit code {process.exitcode}") from None
        if not succeeded:
            raise RankFailure(f"rank {rank} raised:\n{payload}")
        return pickle.loads(payload)


def _work(pipe: Connection) -> None:
    """Body of a worker: run one function after another, until one fails or the parent goes away."""
    torch.set_num_threads(1)
    while True:
        try:
            environment, sys.path[:], timeout_s, payload = pipe.recv()
        except EOFError:
            return
        os.environ.update(environment)
        faulthandler.dump_traceback_later(timeout_s)
        try:
            fn, args = pickle.loads(payload)
            answer = (True, pickle.dumps(fn(*args)))
        except BaseException:
            answer = (False, traceback.format_exc())
        finally:
            faulthandler.cancel_dump_traceback_later()
        pipe.send(answer)
        if not answer[0]:
            return
        if dist.is_initialized():
            _take_groups_down()


def _take_groups_down() -> None:
    # Imported here so that workers for functions without groups do without megatron-core.
    from megatron_hybrid.substrate.groups import destroy_groups

    destroy_groups()
