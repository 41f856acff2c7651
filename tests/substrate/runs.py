"""Small runs for the substrate's tests, and a command that launches entries that end in every way."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hybrid.config.schema import RunConfig
from megatron_hybrid.substrate import ExitCode, StopRequest, Substrate
from megatron_hybrid.substrate.environment import describe_environment
from megatron_hybrid.substrate.launch import run_on_ranks
from megatron_hybrid.substrate.quiet import silence_known_warnings


def small_run(
    *, parallel: dict[str, Any] | None = None, train: dict[str, Any] | None = None, runtime: dict[str, Any] | None = None
) -> RunConfig:
    """A run that validates; nothing reads its files."""
    return RunConfig(
        run_dir=Path("run"),
        model={
            "pattern": "M-M*M-M*", "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_kv_heads": 4, "head_dim": 16,
            "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_num_groups": 4, "mamba_state_dim": 16, "vocab_size": 256,
        },
        data={"sources": {"text": Path("text")}, "sequence_length": 32},
        optimizer={"lr": 1e-3},
        train={"steps": 2, "global_batch_size": 8, "precision": "fp32", **(train or {})},
        parallel=parallel or {},
        runtime={"timeout_s": 60.0, **(runtime or {})},
    )  # fmt: skip


def finish(config: RunConfig, substrate: Substrate) -> ExitCode:
    """Say where this rank is and what command it belongs to, and agree with the others."""
    total = torch.ones(1, device=substrate.device)
    dist.all_reduce(total)
    command = " ".join(describe_environment(substrate.device)["command"][-2:])
    say(f"rank {substrate.rank} of {substrate.world_size}, tensor {substrate.tensor_rank}, all {total.item():g}, by {command}")
    return ExitCode.FINISHED


def refuse(config: RunConfig, substrate: Substrate) -> ExitCode:
    """Every rank finds the same mistake."""
    raise ValueError("the corpus is empty")


def break_on_one_rank(config: RunConfig, substrate: Substrate) -> ExitCode:
    """The last rank fails while the others wait for it in a collective."""
    if substrate.rank == substrate.world_size - 1:
        raise RuntimeError("broken on purpose")
    dist.barrier()
    return ExitCode.FINISHED


def break_beside_a_busy_rank(config: RunConfig, substrate: Substrate) -> ExitCode:
    """One rank fails while the others are in no collective at all."""
    if substrate.rank == 0:
        raise RuntimeError("broken on purpose")
    time.sleep(60)
    return ExitCode.FINISHED


def die_on_one_rank(config: RunConfig, substrate: Substrate) -> ExitCode:
    """The last rank is killed while the others wait for it in a collective."""
    if substrate.rank == substrate.world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return ExitCode.FINISHED


def stop_when_asked(config: RunConfig, substrate: Substrate) -> ExitCode:
    """Work until a stop is requested."""
    stop = StopRequest(substrate)
    say(f"rank {substrate.rank} works, process {os.getpid()}")
    num_steps = 0
    while not stop.requested():
        time.sleep(0.01)
        num_steps += 1
    steps = torch.tensor([num_steps])
    dist.all_reduce(steps, dist.ReduceOp.MAX, group=substrate.control_group)
    say(f"rank {substrate.rank} stopped {'with the others' if steps.item() == num_steps else 'alone'}")
    return ExitCode.STOPPED


def work(config: RunConfig, substrate: Substrate) -> ExitCode:
    """Work without looking at signals."""
    say(f"rank {substrate.rank} works, process {os.getpid()}")
    time.sleep(60)
    return ExitCode.FINISHED


def say(text: str) -> None:
    """Print a line in one write, so that ranks do not mix."""
    os.write(1, f"{text}\n".encode())


if __name__ == "__main__":
    silence_known_warnings()
    _, entry, *options = sys.argv
    layout = {name: int(size) for name, size in (option.split("=") for option in options)}
    timeout_s = layout.pop("timeout_s", 60)
    sys.exit(run_on_ranks(globals()[entry], small_run(parallel=layout, runtime={"timeout_s": timeout_s})))
