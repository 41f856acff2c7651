"""A training step on the CPU beside transformers' NemotronHForCausalLM with torch AdamW: same shapes, same weights, in turns.

    python -m benchmarks.step                    fp32 and bf16 on one rank, then two ranks; about three minutes
    python -m benchmarks.step --profile          where the time of our step goes

The model is 12 layers `M-M*M-M*M-M-`, hidden 256, at 4 samples of 512 tokens. The GEMM floor is the time of the step's matrix products
alone (forward and both gradients of every linear, and of the output layer), on the faster of torch's two CPU libraries. transformers' bf16
keeps weights and moments in bf16; ours keeps fp32 masters and moments.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_hybrid.config import RunConfig
from megatron_hybrid.convert.correspondence import correspondences
from megatron_hybrid.convert.hub_config import UNCLAMPED_TIME_STEP_MIN
from megatron_hybrid.convert.rearrange import to_hub
from megatron_hybrid.data.loader import MicroBatch
from megatron_hybrid.layout.flops import training_flops_per_token
from megatron_hybrid.model.build import build_chunks
from megatron_hybrid.ops.linear import matmul_nt
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.substrate.groups import initialize, shutdown
from megatron_hybrid.substrate.launch import run_on_ranks
from megatron_hybrid.substrate.quiet import silence_known_warnings
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from megatron_hybrid.tasks.pretrain import Pretraining
from megatron_hybrid.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_hybrid.train.step import train_step
from megatron_hybrid.train.task import StepData
from megatron_hybrid.train.trainer import connect_schedules

BATCH, LENGTH = 4, 512
MODEL = {
    "pattern": "M-M*M-M*M-M-",
    "hidden_size": 256,
    "ffn_hidden_size": 1024,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "mamba_num_groups": 2,
    "mamba_state_dim": 64,
    "vocab_size": 4096,
}
Step = Callable[[], float]
"""Runs one training step and returns its loss."""


class FixedBatch(Pretraining):
    """Pretraining on one batch held in memory."""

    def __init__(self, run: RunConfig, config, substrate: Substrate) -> None:
        self.run, self.config, self.substrate = run, config, substrate
        self.micro_batch_shape = (LENGTH, run.train.micro_batch_size)
        first = substrate.data_rank * run.train.micro_batch_size
        tokens_BL = make_tokens()[first : first + run.train.micro_batch_size]
        ones_BL = torch.ones(tokens_BL.shape)
        batch = MicroBatch(
            torch.arange(len(tokens_BL)), tokens_BL[:, :-1], tokens_BL[:, 1:].contiguous(), ones_BL[:, 1:], ones_BL[:, 1:].int() * 0, 0
        )
        self.data = StepData([batch], BATCH, 0)


def make_tokens() -> torch.Tensor:
    """The same [BATCH, LENGTH + 1] token ids everywhere."""
    return torch.randint(0, MODEL["vocab_size"], (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def make_run(precision: str, **parallel: int) -> RunConfig:
    """The benchmark's run; nothing reads its paths."""
    return RunConfig(
        run_dir=Path("unused"),
        model=MODEL,
        data={"sources": {"none": Path("unused")}, "sequence_length": LENGTH},
        optimizer={"lr": 1e-4},
        train={"steps": 1, "global_batch_size": BATCH, "micro_batch_size": BATCH // parallel.get("data", 1), "precision": precision},
        parallel=parallel,
        runtime={"device": "cpu"},
    )


def our_step(run: RunConfig, substrate: Substrate) -> tuple[Step, dict[str, torch.Tensor]]:
    """Our step, and the weights it starts from by global name."""
    config = build_transformer_config(run, substrate)
    task = FixedBatch(run, config, substrate)
    chunks = build_chunks(run, config, substrate)
    weights = {name: parameter.detach().clone() for name, parameter in chunks[0].named_global_parameters()}
    wrapped = wrap_data_parallel(chunks, run, config)
    optimizer = build_optimizer(wrapped, run)
    connect_schedules(config, wrapped, optimizer)
    return lambda: train_step(task, wrapped, optimizer, task.data, substrate).metrics["loss"], weights


def transformers_step(precision: str, weights: dict[str, torch.Tensor]) -> Step:
    """The peer's step from the same weights: forward, backward, clipping, AdamW."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = NemotronHConfig(
        vocab_size=MODEL["vocab_size"],
        hidden_size=MODEL["hidden_size"],
        intermediate_size=MODEL["ffn_hidden_size"],
        num_attention_heads=MODEL["num_attention_heads"],
        num_key_value_heads=MODEL["num_kv_heads"],
        head_dim=MODEL["head_dim"],
        mamba_num_heads=MODEL["mamba_num_heads"],
        mamba_head_dim=MODEL["mamba_head_dim"],
        ssm_state_size=MODEL["mamba_state_dim"],
        n_groups=MODEL["mamba_num_groups"],
        hybrid_override_pattern=MODEL["pattern"],
        time_step_min=UNCLAMPED_TIME_STEP_MIN,
        use_cache=False,
    )
    model = NemotronHForCausalLM(config).train()
    model.load_state_dict(to_transformers(weights), strict=True)
    model.to(torch.float32 if precision == "fp32" else torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens_BL = make_tokens()

    def step() -> float:
        logits_BLV = model(input_ids=tokens_BL[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1).float(), tokens_BL[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def to_transformers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights under transformers' names."""
    model = make_run("fp32").model
    renamed = {}
    for each in correspondences(model):
        native = weights[each.parameter].split([tensor.shape[0] for tensor in each.native])
        renamed |= {theirs.name: tensor for theirs, tensor in zip(each.hub, to_hub(each, native, model), strict=True)}
    return renamed


def gemm_step(precision: str, weights: dict[str, torch.Tensor]) -> Step:
    """The step's matrix products and nothing else, each through the faster library."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    matrices = [tensor.to(dtype) for name, tensor in weights.items() if tensor.dim() == 2 and "word_embeddings" not in name]
    operands = [
        (weight, torch.randn(BATCH * LENGTH, weight.shape[1]).to(dtype), torch.randn(BATCH * LENGTH, weight.shape[0]).to(dtype))
        for weight in matrices
    ]

    def step() -> float:
        for weight_OI, x_MI, dy_MO in operands:
            matmul_nt(x_MI, weight_OI)
            matmul_nt(dy_MO, weight_OI.t())
            matmul_nt(x_MI.t(), dy_MO.t())
        return 0.0

    return step


def time_in_turns(steps: dict[str, Step], num_rounds: int) -> dict[str, float]:
    """Median seconds of each step; they take turns, so that a drift of the machine's speed meets all alike."""
    for step in steps.values():
        step(), step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(num_rounds):
        for name, step in steps.items():
            start_s = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start_s)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(precision: str, num_rounds: int, profile: bool) -> None:
    """One rank: ours, transformers and the GEMM floor."""
    run = make_run(precision)
    substrate = initialize(run)
    ours, weights = our_step(run, substrate)
    theirs = transformers_step(precision, weights)
    first_losses = ours(), theirs()
    assert abs(first_losses[0] - first_losses[1]) < (1e-4 if precision == "fp32" else 2e-2), first_losses
    seconds = time_in_turns({"ours": ours, "transformers": theirs, "gemms": gemm_step(precision, weights)}, num_rounds)
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            ours(), ours()
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))
    flops = BATCH * LENGTH * training_flops_per_token(run.model, LENGTH)
    report = {
        "precision": precision,
        "threads": torch.get_num_threads(),
        "first_losses": first_losses,
        "seconds": seconds,
        "ratio": seconds["transformers"] / seconds["ours"],
        "share_of_gemm_floor": seconds["gemms"] / seconds["ours"],
        "gflops_per_s": flops / seconds["ours"] / 1e9,
    }
    print(json.dumps(report), flush=True)
    shutdown(substrate)


def time_layout(run: RunConfig, substrate: Substrate) -> ExitCode:
    """Entry of the two-rank runs."""
    step, _ = our_step(run, substrate)
    seconds = time_in_turns({"ours": step}, 9)["ours"]
    if substrate.rank == 0:
        layout = {name: size for name, size in (("tensor", substrate.tensor_size), ("data", substrate.data_size)) if size > 1}
        print(json.dumps({"precision": run.train.precision, "layout": layout, "seconds": seconds}), flush=True)
    return ExitCode.FINISHED


def main() -> int:
    """Run the comparison and print one JSON line per case."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="also print where the time of our step goes")
    arguments = parser.parse_args()
    silence_known_warnings()
    for precision in ("fp32", "bf16"):
        compare(precision, arguments.rounds, arguments.profile)
    for precision in ("fp32", "bf16"):
        for layout in ({"tensor": 2}, {"data": 2}):
            code = run_on_ranks(time_layout, make_run(precision, **layout))
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
