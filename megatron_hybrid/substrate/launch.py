"""Run an entry on all ranks of a configuration: on those that torchrun or srun started, or else on local processes started here."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType

import torch.distributed as dist

from megatron_hybrid.config.schema import RunConfig
from megatron_hybrid.interruption import leave_at_once_on, raise_on_interrupt
from megatron_hybrid.substrate import rendezvous
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.substrate.failure import FailureBoard, describe_failure, leave, let_first_failure_speak
from megatron_hybrid.substrate.place import Place, local_rank_environment, place_from_environment
from megatron_hybrid.substrate.quiet import show_own_messages, silence_known_warnings

Entry = Callable[[RunConfig, Substrate], ExitCode]
"""What each rank does: a module-level function (local ranks get it pickled)."""

GRACE_S = 10.0
"""How long local ranks may take to leave by themselves after one failed, before they are killed."""
_FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_NOT_A_FAILURE = (ExitCode.FINISHED, ExitCode.STOPPED)


def run_on_ranks(entry: Entry, config: RunConfig) -> int:
    """Run ``entry(config, substrate)`` on every rank and return the exit code for this process (``ExitCode``, or 128 + a signal's number).

    Started by torchrun or srun, this process is one of their ranks. Started plainly, it is the only rank if the layout needs one, and
    otherwise starts the local ranks, hands SIGTERM, SIGUSR1 and SIGINT on to them and waits. Errors are printed, once for all ranks, and
    not raised. A failed rank among several ends its process here and does not return.
    """
    try:
        place = place_from_environment(os.environ)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    num_ranks = config.parallel.model_ranks * (config.parallel.data or 1)
    if place.launcher == "plain" and num_ranks > 1:
        return _LocalRanks(entry, config, num_ranks).run()
    return _run_rank(entry, config, place)


def _run_rank(entry: Entry, config: RunConfig, place: Place) -> int:
    """Be one rank: set up, run the entry, take down; print an error if no other rank has."""
    # Imported here because the parent of local ranks does without megatron-core.
    from megatron_hybrid.substrate.groups import destroy_groups, initialize, shutdown

    if place.rank == 0:
        show_own_messages()
    board = None
    try:
        raise_on_interrupt()
        wait_s = rendezvous.wait_s(config)
        store = rendezvous.open_store(place, wait_s)
        if place.world_size > 1:
            board = FailureBoard(rendezvous.open_store(place.as_client(), wait_s))
            board.start_watching()
        substrate = initialize(config, place, store)
        exit_code = entry(config, substrate)
        shutdown(substrate)
    except (Exception, KeyboardInterrupt) as error:
        exit_code, text = describe_failure(error, entry)
        let_first_failure_speak(error)
        if board is None or board.claim(exit_code):
            print(text if place.world_size == 1 else f"rank {place.rank}: {text}", file=sys.stderr)
        if place.world_size == 1:
            destroy_groups()
            return exit_code
        if board is not None and place.hosts_store:
            board.wait_for_others(place.world_size - 1)
        leave(exit_code)
    if board is not None:
        board.close()
    return exit_code


class _LocalRanks:
    """The processes of a run on this host, and the one store they meet at, which this process serves."""

    def __init__(self, entry: Entry, config: RunConfig, num_ranks: int) -> None:
        timeout = timedelta(seconds=rendezvous.wait_s(config))
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        environments = [local_rank_environment(rank, num_ranks, self._store.port) for rank in range(num_ranks)]
        payload = pickle.dumps((entry, config))
        context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = [
            context.Process(target=_local_rank, name=f"rank {rank}", args=(payload, environment))
            for rank, environment in enumerate(environments)
        ]
        self._board = FailureBoard(rendezvous.attempt_store(self._store, "0"))
        self._forwarded: list[signal.Signals] = []
        self._exit_code: int = ExitCode.FINISHED
        self._deadline_s = float("inf")

    def run(self) -> int:
        """Start the ranks, wait for all of them, and return the exit code of the first that failed, else the one they agree on."""
        with self._forwarding_signals():
            try:
                self._start()
                self._wait()
            finally:
                self._kill()
        return self._exit_code

    def _start(self) -> None:
        # Ranks that are still importing would only print tracebacks, so Ctrl-C waits until they can take it. What starts processes also
        # starts this tracker, once, and takes signals up again when it has.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for process in self._processes:
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def _wait(self) -> None:
        running = {process.sentinel: process for process in self._processes}
        while running and time.monotonic() < self._deadline_s:
            for sentinel in wait(list(running), timeout=1.0):
                self._note_end(running.pop(sentinel))

    def _note_end(self, process: BaseProcess) -> None:
        process.join()
        code = process.exitcode
        assert code is not None
        if self._exit_code in _NOT_A_FAILURE:
            self._exit_code = 128 - code if code < 0 else max(self._exit_code, code)
        if code not in _NOT_A_FAILURE:
            self._leave_within_grace()
        if code < 0 and self._board.claim(128 - code):
            print(f"{process.name} was ended by {signal.Signals(-code).name}{self._reason(-code)}", file=sys.stderr)

    def _reason(self, number: int) -> str:
        if number in self._forwarded:
            return ", which came before the run could take it as a request to save"
        return "; if nobody sent it, the host ran out of memory" if number == signal.SIGKILL else ""

    def _leave_within_grace(self) -> None:
        self._deadline_s = min(self._deadline_s, time.monotonic() + GRACE_S)

    def _kill(self) -> None:
        is_silent = self._processes[0].is_alive() and signal.SIGINT in self._forwarded
        for process in self._processes:
            if process.pid is not None:
                process.kill()
                process.join()
        if is_silent and self._board.claim(self._exit_code):
            print("interrupted", file=sys.stderr)

    @contextlib.contextmanager
    def _forwarding_signals(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._forward) for number in _FORWARDED_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._forwarded.append(signal.Signals(number))
        if number == signal.SIGINT:
            self._exit_code = 128 + number
            self._leave_within_grace()
        for process in self._processes:
            if process.pid is not None and process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)


def _local_rank(payload: bytes, environment: dict[str, str]) -> None:
    """Body of a local rank's process."""
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    # Its own process group, so that Ctrl-C comes once, from the parent.
    os.setpgid(0, 0)
    os.environ.update(environment)
    leave_at_once_on(signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # gloo would ask the resolver for this host's name, which a laptop without a network may not know.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    silence_known_warnings()
    entry, config = pickle.loads(payload)
    sys.exit(_run_rank(entry, config, place_from_environment(os.environ)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    leave(ExitCode.ERROR)
