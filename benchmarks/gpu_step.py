"""A training step on one GPU beside megatron-core's own MambaModel with Transformer Engine: same shapes, weights, data and optimizer.

    python -m benchmarks.gpu_step quarter-8b                        both systems in BF16, in processes of their own, and the ratio
    python -m benchmarks.gpu_step nano-4b --precision delayed       the same in float8
    python -m benchmarks.gpu_step quarter-8b --system ours --profile

quarter-8b is 13 layers of Nemotron-H 8B at 4 micro-batches of 1 x 8,192 tokens, nano-4b the whole Nemotron-3-Nano-4B at 8 of 1 x 4,096.
Tokens are random. Both systems keep the output layer in BF16, use the distributed optimizer with fp32 gradients, and clip. FLOPs are those
of layout/flops.py for both; MFU is of 989 TFLOP/s. Peak memory is that of a step without CUDA graph, as the allocator counts it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.load import load_model
from megatron_hybrid.data.loader import MicroBatch
from megatron_hybrid.layers.specs import explain_implementations
from megatron_hybrid.layout.flops import training_flops_per_token
from megatron_hybrid.model import build
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.groups import initialize, shutdown
from megatron_hybrid.substrate.quiet import silence_known_warnings
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from megatron_hybrid.tasks.pretrain import Pretraining
from megatron_hybrid.train.graph import make_graph
from megatron_hybrid.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_hybrid.train.step import train_step
from megatron_hybrid.train.task import StepData
from megatron_hybrid.train.trainer import connect_schedules

CASES = {
    "quarter-8b": ("nemotron-h-8b", ["model.pattern=M-M-M-M*-M-M-"], 8192, 4),
    "nano-4b": ("nemotron-3-nano-4b", [], 4096, 8),
}
"""Preset, its overrides, tokens per sample, micro-batches per step."""
PEAK_FLOPS = 989e12
Step = Callable[[], float]
"""Runs one training step and returns its loss."""


def make_run(
    case: str,
    precision: str,
    *,
    deterministic: bool = False,
    graphs: str = "auto",
    length: int | None = None,
    fp8_implementation: str = "auto",
    kernels: dict[str, str] | None = None,
) -> RunConfig:
    """The benchmark's run; nothing reads its paths. ``length`` changes the sequence length and keeps the tokens of a step; ``kernels`` are
    operations in implementations other than the host's own choice."""
    preset, overrides, case_length, num_micro_batches = CASES[case]
    tokens = case_length * num_micro_batches
    length = length or case_length
    return RunConfig(
        run_dir=Path("unused"),
        model=load_model(preset, overrides)[0],
        data={"sources": {"none": Path("unused")}, "sequence_length": length},
        optimizer={"lr": 1e-4},
        train={"steps": 1, "global_batch_size": tokens // length},
        parallel={"data": 1},
        fp8={"recipe": "off" if precision == "bf16" else precision, "implementation": fp8_implementation},
        kernels=kernels or {},
        runtime={"device": "cuda", "deterministic": deterministic, "cuda_graphs": graphs},
    )


class FixedBatch(Pretraining):
    """Pretraining on one step's batch held on the GPU."""

    def __init__(self, run: RunConfig, config: Any, substrate: Substrate) -> None:
        self.run, self.config, self.substrate = run, config, substrate
        self.micro_batch_shape = (run.data.sequence_length, 1)
        micro_batches = []
        for tokens_BL in make_tokens(run, substrate.device):
            ones_BL = torch.ones(1, run.data.sequence_length, device=substrate.device)
            micro_batches.append(
                MicroBatch(torch.zeros(1), tokens_BL[:, :-1].contiguous(), tokens_BL[:, 1:].contiguous(), ones_BL, ones_BL.int() * 0, 0)
            )
        self.data = StepData(micro_batches, len(micro_batches), 0)


def make_tokens(run: RunConfig, device: torch.device) -> list[torch.Tensor]:
    """Random [1, L + 1] token ids for each micro-batch, the same for both systems."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, run.data.sequence_length + 1)
    return [torch.randint(0, run.model.vocab_size, shape, generator=generator, device=device) for _ in range(run.train.global_batch_size)]


def fill_weights(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], run: RunConfig) -> None:
    """The same weights for both systems, which share their names; drawn on the GPU, because the host takes a minute for 3 billion."""
    for name, parameter in named_parameters:
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        with torch.no_grad():
            if parameter.dim() == 2:
                into_residual = name.endswith(("out_proj.weight", "linear_fc2.weight", "linear_proj.weight"))
                std = run.model.init_std / (math.sqrt(run.model.num_layers) if into_residual else 1)
                parameter.normal_(0, std, generator=generator)
            elif name.endswith("conv1d.weight"):
                parameter.uniform_(-0.5, 0.5, generator=generator)
            elif name.endswith("A_log"):
                parameter.copy_(torch.linspace(1, 16, len(parameter)).log())
            elif name.endswith("dt_bias"):
                parameter.copy_(torch.logspace(-3, -1, len(parameter)).expm1().log())
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def our_step(run: RunConfig, substrate: Substrate) -> Step:
    """This project's step, as the trainer runs it."""
    config = build_transformer_config(run, substrate)
    print(explain_implementations(substrate.device, config.params_dtype, run.kernels, build.called_operations(run)), file=sys.stderr)
    task = FixedBatch(run, config, substrate)
    build.initialize_parameters = lambda named, **_: fill_weights(named, run)
    wrapped = wrap_data_parallel(build.build_chunks(run, config, substrate), run, config)
    optimizer = build_optimizer(wrapped, run)
    connect_schedules(config, wrapped, optimizer)
    graph = make_graph(run, task, wrapped, substrate)
    graphs = iter([None, None])

    def step() -> float:
        # As in the trainer, the first step compiles; one more without a graph shows its memory.
        return train_step(task, wrapped, optimizer, task.data, substrate, next(graphs, graph)).metrics["loss"]

    return step


def peer_step(run: RunConfig, substrate: Substrate) -> Step:
    """megatron-core's MambaModel with Transformer Engine's layers, mamba_ssm's kernels and Transformer Engine's fused loss."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.mamba import MambaModel
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig

    model, fp8 = run.model, run.fp8.recipe
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        mamba_num_heads=model.mamba_num_heads,
        mamba_head_dim=model.mamba_head_dim,
        mamba_num_groups=model.mamba_num_groups,
        mamba_state_dim=model.mamba_state_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        activation_func=lambda x: torch.pow(torch.nn.functional.relu(x), 2),
        gated_linear_unit=False,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        fp8=None if fp8 == "off" else "hybrid",
        fp8_recipe="tensorwise" if fp8 == "current" else "delayed",
        fp8_amax_history_len=run.fp8.delayed.history_length,
        fp8_amax_compute_algo="max",
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="te",
        bias_dropout_fusion=True,
        # Needs NVIDIA's apex
        gradient_accumulation_fusion=False,
    )
    length = run.data.sequence_length
    module = MambaModel(config, mamba_stack_spec, model.padded_vocab_size, length, hybrid_override_pattern=model.layer_kinds)
    module = module.cuda().bfloat16()
    fill_weights(module.named_parameters(), run)
    wrapped = DistributedDataParallel(
        config, DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True), module
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=run.optimizer.lr,
            weight_decay=run.optimizer.weight_decay,
            adam_beta1=run.optimizer.beta1,
            adam_beta2=run.optimizer.beta2,
            adam_eps=run.optimizer.eps,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            clip_grad=run.optimizer.clip_grad,
        ),
        [wrapped],
    )
    config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, optimizer.scale_loss
    tokens = make_tokens(run, substrate.device)

    def forward_step(batches: Any, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        tokens_BL = next(batches)
        losses = chunk(tokens_BL[:, :-1], None, None, labels=tokens_BL[:, 1:].contiguous())
        return losses, lambda output: (output.float().mean(), {"loss": output.detach().float().mean()})

    def step() -> float:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        metrics = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(tokens),
            model=[wrapped],
            num_microbatches=len(tokens),
            seq_length=length,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()
        return float(sum(each["loss"] for each in metrics) / len(metrics))

    return step


def measure(system: str, run: RunConfig, num_steps: int, profile: bool) -> dict[str, Any]:
    """One system's figures: losses of the first steps, median seconds, throughput, memory."""
    substrate = initialize(run)
    step = (our_step if system == "ours" else peer_step)(run, substrate)
    start_s = time.perf_counter()
    losses = [step()]
    torch.cuda.synchronize()
    first_step_s = time.perf_counter() - start_s
    torch.cuda.reset_peak_memory_stats()
    losses.append(step())
    peak_gib = torch.cuda.max_memory_allocated() / 2**30
    losses.append(step())
    times_s = []
    for _ in range(num_steps):
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        times_s.append(time.perf_counter() - start_s)
    seconds = sorted(times_s)[num_steps // 2]
    tokens_per_s = run.tokens_per_step / seconds
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=80), file=sys.stderr)
    flops_per_token = training_flops_per_token(run.model, run.data.sequence_length)
    report = {
        "system": system,
        "step_s": round(seconds, 4),
        "min_s": round(min(times_s), 4),
        "tokens_per_s": round(tokens_per_s),
        "mfu": round(tokens_per_s * flops_per_token / PEAK_FLOPS, 4),
        "peak_gib": round(peak_gib, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "first_step_s": round(first_step_s, 1),
        "losses": [round(loss, 4) for loss in losses],
        "gpu": torch.cuda.get_device_name(),
    }
    shutdown(substrate)
    return report


def main() -> int:
    """Print one JSON line per system, and one with the ratio."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--precision", choices=("bf16", "delayed", "current"), default="bf16")
    parser.add_argument("--system", choices=("both", "ours", "peer"), default="both")
    parser.add_argument("--steps", type=int, default=7, help="counted steps (default: %(default)s)")
    parser.add_argument("--length", type=int, help="another sequence length, at the same tokens per step")
    parser.add_argument("--graphs", choices=("auto", "off"), default="auto", help="CUDA graphs of ours")
    parser.add_argument("--fp8-implementation", default="auto", help="of ours, as fp8.implementation")
    parser.add_argument("--deterministic", action="store_true", help="deterministic algorithms in ours")
    parser.add_argument("--kernels", nargs="*", default=[], metavar="OPERATION=IMPLEMENTATION", help="of ours, such as attention=sdpa")
    parser.add_argument("--profile", action="store_true", help="also print where the time of a step goes")
    arguments = parser.parse_args()
    if arguments.system == "both":
        reports = []
        for system in ("peer", "ours"):
            command = [sys.executable, "-m", "benchmarks.gpu_step", *sys.argv[1:], "--system", system]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            print(output, end="", flush=True)
            reports.append(json.loads(output.splitlines()[-1]))
        ratio = reports[1]["tokens_per_s"] / reports[0]["tokens_per_s"]
        memory = reports[1]["peak_gib"] / reports[0]["peak_gib"]
        print(json.dumps({"case": arguments.case, "precision": arguments.precision, "ratio": round(ratio, 3), "memory": round(memory, 3)}))
        return 0
    silence_known_warnings()
    run = make_run(
        arguments.case,
        arguments.precision,
        deterministic=arguments.deterministic,
        graphs=arguments.graphs,
        length=arguments.length,
        fp8_implementation=arguments.fp8_implementation,
        kernels=dict(choice.split("=", 1) for choice in arguments.kernels),
    )
    report = measure(arguments.system, run, arguments.steps, arguments.profile)
    print(json.dumps({"case": arguments.case, "precision": arguments.precision} | report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
