"""Tokens per second of a 2B-class hybrid at batch 1, 8, 32 and 128, beside transformers' NemotronH from the same weights, in one process.

    python -m benchmarks.decode                     on an H100, about three minutes
    python -m benchmarks.decode --no-peer           ours alone, under one minute
    python -m benchmarks.decode --profile           also the kernels of a step, by time
    python -m benchmarks.decode --linears           the fused linears beside torch's, by shape and batch
    python -m benchmarks.decode --tiny --batch 1 2  a few layers, to see that it runs on a CPU

bf16, random weights, greedy. Throughput is batch x new tokens / time of the whole call, prompt included, which is how Megatron-LM publishes
its own (60 tokens in, 128 out, one H100: 38, 303, 1,211 and 4,459 tokens/s). The floor of a step is what it has to read and write (all
weights but the embedding, states twice, keys and values once) at the bandwidth that a copy reaches here. Prints one JSON line per case.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import fields

import torch

from benchmarks.generation_models import HYBRID_2B, device_name, hub_weights, make_run, memory_bandwidth, random_model, synchronize
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.convert.hub_config import UNCLAMPED_TIME_STEP_MIN, hub_from_model
from megatron_hybrid.generate.engine import Engine, Start
from megatron_hybrid.generate.sampling import Sampling
from megatron_hybrid.layers.sequence import MambaCache
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.ops import decode as decode_ops
from megatron_hybrid.substrate.groups import initialize, shutdown
from megatron_hybrid.substrate.quiet import silence_known_warnings

TINY = HYBRID_2B | {"pattern": "M-*-", "hidden_size": 256, "ffn_hidden_size": 512, "mamba_num_heads": 8, "vocab_size": 1024}
GREEDY = Sampling(temperature=0.0)
PUBLISHED = {1: 38.2, 8: 302.7, 32: 1211.1, 128: 4458.5}
"""Tokens/s of Megatron-LM's hybrid 2B on one H100 (its performance test's baseline file)."""


def make_prompts(batch: int, length: int, vocab_size: int) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(vocab_size, (batch, length), generator=generator).tolist()


def generate(engine: Engine, prompts: list[list[int]], num_new: int) -> tuple[list[list[int]], float]:
    """The new tokens, and the seconds that all but the first of them took."""
    tokens = [engine.prefill(0, [Start(prompt, GREEDY, 0) for prompt in prompts])]
    start_s = time.perf_counter()
    steps = [engine.step() for _ in range(num_new - 1)]
    tokens += [step.fetch()[: len(prompts)] for step in steps]
    seconds = time.perf_counter() - start_s
    for slot in range(len(prompts)):
        engine.release(slot)
    return [list(row) for row in zip(*tokens)], seconds


def floor_bytes(model: HybridModel, engine: Engine, batch: int, length: int) -> int:
    """What a step reads and writes at the least, with ``length`` tokens in the caches."""
    weights = sum(p.nbytes for name, p in model.named_parameters() if "word_embeddings" not in name)
    caches = 0
    for cache in engine.caches:
        if cache is not None:
            per_sequence = sum(getattr(cache, field.name).nbytes for field in fields(cache)) // engine.max_batch_size
            caches += 2 * per_sequence if isinstance(cache, MambaCache) else per_sequence * length // engine.max_length
    return weights + batch * caches


def measure(model: HybridModel, batch: int, prompt_length: int, num_new: int, bandwidth: float, vocab_size: int) -> dict[str, object]:
    """One case of ours."""
    device = next(model.parameters()).device
    engine = Engine(model, max_batch_size=batch, max_length=prompt_length + num_new, vocab_size=vocab_size)
    prompts = make_prompts(batch, prompt_length, vocab_size)
    generate(engine, prompts, 8)
    best_s, step_s = float("inf"), float("inf")
    for _ in range(2):
        synchronize(device)
        start_s = time.perf_counter()
        tokens, decode_s = generate(engine, prompts, num_new)
        synchronize(device)
        best_s, step_s = min(best_s, time.perf_counter() - start_s), min(step_s, decode_s / (num_new - 1))
    floor_s = floor_bytes(model, engine, batch, prompt_length + num_new // 2) / bandwidth
    return {
        "case": "ours",
        "batch": batch,
        "prompt_tokens": prompt_length,
        "new_tokens": num_new,
        "tokens_per_s": round(batch * num_new / best_s, 1),
        "decode_tokens_per_s": round(batch / step_s, 1),
        "step_ms": round(1e3 * step_s, 4),
        "floor_ms": round(1e3 * floor_s, 4),
        "share_of_floor": round(floor_s / step_s, 3),
        "published_tokens_per_s": PUBLISHED.get(batch),
        "first_tokens": tokens[0][:8],
    }


def check(model: HybridModel, vocab_size: int) -> dict[str, object]:
    """Whether decoding gives what a forward pass over the whole sequences does: largest difference of the logits, and agreement of the
    most probable tokens."""
    prompts = make_prompts(3, 200, vocab_size)
    prompts[1], prompts[2] = prompts[1][:77], prompts[2][:3]
    engine = Engine(model, max_batch_size=3, max_length=240, vocab_size=vocab_size)
    tokens, _ = generate(engine, prompts, 32)
    agreement = []
    with torch.inference_mode():
        for prompt, new in zip(prompts, tokens):
            whole_BL = torch.tensor([prompt + new], device=next(model.parameters()).device)
            logits_LV = model(whole_BL)[0, len(prompt) - 1 : -1].float()
            best_L = logits_LV.max(-1).values
            chosen_L = logits_LV.gather(1, whole_BL[0, len(prompt) :, None]).squeeze(1)
            # Bf16 near-ties fall either way: what counts is how much worse the chosen token is.
            agreement.append(((best_L - chosen_L).max() / logits_LV.std()).item())
    return {"case": "check", "largest_regret_in_logit_std": [round(each, 4) for each in agreement]}


def peer(model: HybridModel, config: ModelConfig, device: torch.device) -> Callable[[list[list[int]], int], tuple[list[int], float]]:
    """transformers' model from the same weights: a function from prompts and a number of new tokens to the first prompt's new tokens and
    the seconds of the call."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    hub = hub_from_model(config, style="transformers", dtype="bfloat16", max_position_embeddings=8192, token_ids={})
    settings = {key: value for key, value in hub.items() if key not in ("architectures", "model_type", "torch_dtype")}
    settings |= {"time_step_min": UNCLAMPED_TIME_STEP_MIN}
    with torch.device("meta"):
        theirs = NemotronHForCausalLM(NemotronHConfig(**settings)).eval()
    theirs.load_state_dict(hub_weights(model, config), strict=True, assign=True)
    theirs.generation_config.pad_token_id = 0

    def call(prompts: list[list[int]], num_new: int) -> tuple[list[int], float]:
        tokens_BL = torch.tensor(prompts, device=device)
        synchronize(device)
        start_s = time.perf_counter()
        with torch.inference_mode():
            out_BL = theirs.generate(
                tokens_BL, attention_mask=torch.ones_like(tokens_BL), max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False
            )
        synchronize(device)
        assert out_BL.shape[1] == tokens_BL.shape[1] + num_new
        return out_BL[0, tokens_BL.shape[1] :].tolist(), time.perf_counter() - start_s

    return call


def compare_linears(model: HybridModel, device: torch.device) -> None:
    """Microseconds of each linear of a step, fused and torch's, replayed from a graph over weights that no cache holds."""
    from megatron_hybrid.ops.triton import decode_linear

    bandwidth = memory_bandwidth(device)
    shapes = {tuple(p.shape) for name, p in model.named_parameters() if p.dim() == 2 and "word_embeddings" not in name}
    for output_size, input_size in sorted(shapes):
        copies = max(2, (200 << 20) // (2 * output_size * input_size))
        weights = [torch.randn(output_size, input_size, device=device, dtype=torch.bfloat16) for _ in range(copies)]
        norm = torch.ones(input_size, device=device, dtype=torch.bfloat16)
        for batch in (1, 2, 8, 16, 32):
            x = torch.randn(batch, input_size, device=device, dtype=torch.bfloat16)
            residual = torch.randn(batch, output_size, device=device, dtype=torch.bfloat16)
            cases = {
                "norm_linear": lambda w, x=x, n=norm: decode_linear.norm_linear(x, n, w, 1e-5),
                "norm_and_torch": lambda w, x=x, n=norm: torch.nn.functional.linear(decode_linear.rms_norm(x, n, 1e-5), w),
                "linear": lambda w, x=x, r=residual: decode_linear.linear(x, w, r),
                "torch_addmm": lambda w, x=x, r=residual: r.addmm_(x, w.t()),
            }
            times = {
                name: time_graph(lambda run=run, weights=weights: [run(weight) for weight in weights]) / copies
                for name, run in cases.items()
            }
            floor_us = 2 * output_size * input_size / bandwidth * 1e6
            print(
                json.dumps(
                    {"weight": [output_size, input_size], "batch": batch, "floor_us": round(floor_us, 2)}
                    | {name: round(1e6 * seconds, 2) for name, seconds in times.items()}
                ),
                flush=True,
            )


def time_graph(run: Callable[[], object]) -> float:
    """Seconds of a replay, the best of ten."""
    for _ in range(2):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    best_s = float("inf")
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best_s = min(best_s, begin.elapsed_time(end) / 1e3)
    return best_s


def profile_step(model: HybridModel, batch: int, vocab_size: int) -> None:
    """Print the kernels of a step by their time."""
    engine = Engine(model, max_batch_size=batch, max_length=1200, vocab_size=vocab_size)
    engine.prefill(0, [Start(prompt, GREEDY, 0) for prompt in make_prompts(batch, 64, vocab_size)])
    for _ in range(3):
        engine.step().fetch()
    activities = [torch.profiler.ProfilerActivity.CUDA if torch.cuda.is_available() else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(10):
            engine.step()
        synchronize(next(model.parameters()).device)
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(f"ten steps at batch {batch}")
    print(profiler.key_averages().table(sort_by=key, row_limit=16, max_name_column_width=60))


def main() -> int:
    """Run the cases and print one JSON line for each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128], help="batch sizes (default: %(default)s)")
    parser.add_argument("--prompt", type=int, nargs="+", default=[64, 1024], help="prompt tokens (default: %(default)s)")
    parser.add_argument("--new", type=int, default=128, help="new tokens (default: %(default)s)")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step")
    parser.add_argument("--linears", action="store_true", help="only compare the linears; needs a GPU")
    parser.add_argument("--tiny", action="store_true", help="a model of four layers")
    arguments = parser.parse_args()
    silence_known_warnings()
    config = ModelConfig(**(TINY if arguments.tiny else HYBRID_2B))
    run = make_run(config, "bf16")
    substrate = initialize(run)
    device = substrate.device
    model = random_model(run, substrate)
    if arguments.linears:
        compare_linears(model, device)
        shutdown(substrate)
        return 0
    bandwidth = memory_bandwidth(device)
    facts = {
        "device": device_name(device),
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "ops": decode_ops.decode_ops_for(device).mamba_step.__module__,
    }
    print(json.dumps(facts), flush=True)
    print(json.dumps(check(model, config.vocab_size)), flush=True)
    ours = {}
    for prompt_length in arguments.prompt:
        for batch in arguments.batch:
            report = measure(model, batch, prompt_length, arguments.new, bandwidth, config.vocab_size)
            ours[batch, prompt_length] = report["tokens_per_s"]
            print(json.dumps(report), flush=True)
    if arguments.profile:
        for batch in (arguments.batch[0], arguments.batch[-1]):
            profile_step(model, batch, config.vocab_size)
    if not arguments.no_peer:
        call = peer(model, config, device)
        prompt_length = arguments.prompt[0]
        for batch in arguments.batch:
            prompts = make_prompts(batch, prompt_length, config.vocab_size)
            call(prompts, 4)
            tokens, seconds = call(prompts, arguments.new)
            rate = batch * arguments.new / seconds
            report = {"case": "transformers", "batch": batch, "prompt_tokens": prompt_length, "new_tokens": arguments.new}
            report |= {"tokens_per_s": round(rate, 1), "ours_is_times": round(ours[batch, prompt_length] / rate, 2)}
            report |= {"first_tokens": tokens[:8]}
            print(json.dumps(report), flush=True)
    shutdown(substrate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
