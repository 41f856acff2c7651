"""``serve``: a trained model over HTTP, in OpenAI's protocol."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_hybrid.commands.model_arguments import add_model_arguments, load_requested_run
from megatron_hybrid.interruption import leave_at_once_on

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from megatron_hybrid.config import RunConfig
    from megatron_hybrid.generate.session import Session
    from megatron_hybrid.substrate import ExitCode, Substrate

_EPILOG = """examples:
  python -m megatron_hybrid serve runs/quickstart/model --port 8000
  python -m megatron_hybrid serve models/nemotron-h-8b --tensor 2 --max-batch-size 64 --max-length 16384
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
       -d '{"model": "model", "prompt": "import os", "max_tokens": 32, "temperature": 0.7}'

Endpoints: /v1/models, /v1/completions, /v1/chat/completions (where the model has a chat template) and /health. SIGTERM or Ctrl-C lets what
is under way finish, up to --shutdown-timeout; while the model is loading it ends the process at once. There is no authentication and no
TLS: beyond this host, put a proxy in front.
"""
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(argv: Sequence[str]) -> int:
    """Parse the command line and serve; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_hybrid serve",
        description="Serve a trained model over HTTP.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    whole = {"type": int, "metavar": "N"}
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this host alone)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 for a free one, which is then reported (default: %(default)s)")
    parser.add_argument("--name", help="what clients call the model (default: its directory's name)")
    parser.add_argument("--max-batch-size", **whole, default=16, help="sequences at a time (default: %(default)s)")
    parser.add_argument("--max-length", **whole, default=4096, help="tokens of a sequence, prompt included (default: %(default)s)")
    parser.add_argument("--max-waiting", **whole, default=64, help="choices that may wait; beyond: status 429 (default: %(default)s)")
    parser.add_argument("--max-tokens", **whole, default=2048, help="new tokens that a request may ask for (default: %(default)s)")
    parser.add_argument("--max-body-kib", **whole, default=2048, help="largest body of a request, in KiB (default: %(default)s)")
    parser.add_argument("--prefill-tokens", **whole, default=2048, help="prompt tokens read between steps (default: %(default)s)")
    parser.add_argument("--shutdown-timeout", **whole, default=30, help="seconds to finish in when asked to stop (default: %(default)s)")
    arguments = parser.parse_args(argv)
    for name in ("max_batch_size", "max_tokens", "max_body_kib", "prefill_tokens", "shutdown_timeout"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if arguments.max_length < 2:
        parser.error(f"--max-length must be at least 2, a token and the next, got {arguments.max_length}")
    if arguments.max_waiting < 0:
        parser.error(f"--max-waiting must be at least 0, got {arguments.max_waiting}")
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        parser.error(f"serving needs {error.name}, which is not installed; pip install 'megatron-hybrid[serve]'")
    # Only now: torch and megatron-core take seconds that a typing error should not have to wait for.
    from megatron_hybrid.substrate.quiet import silence_known_warnings

    silence_known_warnings()
    from megatron_hybrid.substrate.launch import run_on_ranks

    try:
        run = load_requested_run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run_on_ranks(partial(_serve, arguments), run)


def _serve(arguments: argparse.Namespace, run: RunConfig, substrate: Substrate) -> ExitCode:
    """Load the model; on the first rank serve until asked to stop."""
    leave_at_once_on(*_STOP_SIGNALS)
    from megatron_hybrid.generate.load import load_language_model
    from megatron_hybrid.generate.session import lead
    from megatron_hybrid.substrate import ExitCode

    language_model = load_language_model(run, arguments.model, substrate, step=arguments.checkpoint)
    came = _stop_together(substrate.control_group)
    lead(
        language_model,
        substrate,
        partial(_listen, arguments, came),
        max_batch_size=arguments.max_batch_size,
        max_length=arguments.max_length,
        prefill_tokens=arguments.prefill_tokens,
    )
    return ExitCode.FINISHED


def _stop_together(group: ProcessGroup) -> Sequence[int]:
    """Wait for all ranks, which so far leave at once when a signal comes. Afterwards none does by itself: the first one listens until
    asked, and dismisses the others. Returns the list that signals come into.

    Raises:
        RuntimeError: a rank has left, and no signal came here.
    """
    from torch import distributed as dist

    came: list[int] = []
    # Before the barrier: a rank that left behind it would leave others that went on. A mask would not do, other threads take signals too.
    for number in _STOP_SIGNALS:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        dist.barrier(group)
    except RuntimeError:
        # A signal has met another rank while it was loading: this one does as that one did.
        leave_at_once_on(*_STOP_SIGNALS)
        for number in came:
            signal.raise_signal(number)
        raise
    return came


def _listen(arguments: argparse.Namespace, came: Sequence[int], session: Session) -> None:
    """Serve until a signal comes, or not at all where one ``came`` already."""
    import uvicorn

    from megatron_hybrid.serve.app import Endpoints, Limits
    from megatron_hybrid.serve.worker import Worker
    from megatron_hybrid.substrate.exit_codes import RunError

    def stop() -> None:
        server.should_exit = True

    worker = Worker(session, max_waiting=arguments.max_waiting, on_failure=stop)
    name = arguments.name or arguments.model.resolve().name
    app = Endpoints(worker, name, Limits(arguments.max_tokens, arguments.max_body_kib * 1024)).app()
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=arguments.host,
            port=arguments.port,
            log_level="info",
            access_log=False,
            timeout_graceful_shutdown=arguments.shutdown_timeout,
            # Beyond open requests there are those that are refused, and health checks.
            limit_concurrency=4 * worker.max_requests + 64,
        )
    )
    print(
        f"[{session.language_model.checkpoint} as {name!r}: {arguments.max_batch_size} sequences of {arguments.max_length:,} tokens]",
        flush=True,
    )
    for number in _STOP_SIGNALS:
        # The server sets the same while it runs, and lets the signal come through once it has finished.
        signal.signal(number, server.handle_exit)
    if came:
        return
    with contextlib.suppress(SystemExit):
        # What it says where it cannot listen, after its own message.
        server.run()
    if not server.started:
        raise RunError(f"could not listen at {arguments.host}:{arguments.port}; choose another --port or --host")
    if worker.failure is not None:
        raise RunError(f"generating failed: {type(worker.failure).__name__}: {worker.failure}") from worker.failure
