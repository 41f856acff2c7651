"""The Nemotron-H paper's claim: at 65,536 tokens in and 1,024 out, a hybrid gives several times the tokens per second of a Transformer.

    python -m benchmarks.long_context               on an H100, about three minutes
    python -m benchmarks.long_context --tiny        small models and lengths, to see that it runs on a CPU

A hybrid of 2.1 billion parameters and a pure Transformer of as many (attention and MLP layers of the same widths), random weights, bf16,
each through the same engine at the largest batch whose caches fit the GPU beside the weights and a prefill's activations. Two things are
measured: the prefill of one whole prompt, in pieces; and decoding steps of the full batch, whose sequences all stand in the middle of
their output (they are copies of that prompt's). Throughput is composed of them:

    tokens/s = batch x new / (batch x prefill_s + new x step_s)

since prompts are read one after another and all sequences then decode together. Prints one JSON line per model and one for their ratio.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time

import torch

from benchmarks.generation_models import HYBRID_2B, device_name, make_run, random_model, synchronize
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.generate.engine import Engine, Start
from megatron_hybrid.generate.sampling import Sampling
from megatron_hybrid.layout.parameters import num_parameters
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.groups import initialize, shutdown
from megatron_hybrid.substrate.quiet import silence_known_warnings

TINY = HYBRID_2B | {"pattern": "M-M-*-M-", "hidden_size": 256, "ffn_hidden_size": 512, "mamba_num_heads": 8, "vocab_size": 1024}
GREEDY = Sampling(temperature=0.0)
_RESERVE_BYTES = 6 << 30
"""For a prefill's activations and the graph's."""


def transformer_like(hybrid: ModelConfig) -> ModelConfig:
    """The pure Transformer of the same widths whose parameters are nearest in number to the hybrid's."""
    target = num_parameters(hybrid)
    candidates = [hybrid.model_copy(update={"pattern": "*-" * pairs}) for pairs in range(1, hybrid.num_layers + 1)]
    return min(candidates, key=lambda each: abs(num_parameters(each) - target))


def largest_batch(config: ModelConfig, model: HybridModel, max_length: int, reserve_bytes: int, device: torch.device) -> int:
    """Sequences whose caches fit into what is free now."""
    one = Engine(model, max_batch_size=1, max_length=max_length, vocab_size=config.vocab_size, use_graphs=False).cache_bytes
    gc.collect()
    if device.type != "cuda":
        return 3
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info()
    return max(1, (free_bytes - reserve_bytes) // one)


def measure(
    config: ModelConfig, substrate: Substrate, *, prompt_length: int, num_new: int, num_steps: int, prefill_tokens: int
) -> dict[str, object]:
    """Prefill and steps of one model."""
    device = substrate.device
    model = random_model(make_run(config, "bf16"), substrate)
    max_length = prompt_length + num_new
    batch = largest_batch(config, model, max_length, _RESERVE_BYTES, device)
    engine = Engine(model, max_batch_size=batch, max_length=max_length, vocab_size=config.vocab_size, prefill_tokens=prefill_tokens)
    prompt = torch.randint(config.vocab_size, (prompt_length + num_new // 2 - num_steps // 2,)).tolist()
    # Once to compile and to warm up, with a short prompt of two pieces.
    engine.prefill(0, [Start(prompt[: min(prompt_length, prefill_tokens + 64)], GREEDY, 0)])
    engine.release(0)
    synchronize(device)
    start_s = time.perf_counter()
    engine.prefill(0, [Start(prompt[:prompt_length], GREEDY, 0)])
    synchronize(device)
    prefill_s = time.perf_counter() - start_s
    engine.release(0)
    # Now to the middle of the output, and into every slot.
    engine.prefill(0, [Start(prompt, GREEDY, 0)])
    engine.fork(0, {slot: Start(prompt, GREEDY, slot) for slot in range(1, batch)})
    engine.step().fetch()
    synchronize(device)
    start_s = time.perf_counter()
    steps = [engine.step() for _ in range(num_steps)]
    steps[-1].fetch()
    step_s = (time.perf_counter() - start_s) / num_steps
    return {
        "layers": config.layer_kinds,
        "parameters": num_parameters(config),
        "batch": batch,
        "cache_gib_per_sequence": round(engine.cache_bytes / batch / 2**30, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if device.type == "cuda" else None,
        "prompt_tokens": prompt_length,
        "new_tokens": num_new,
        "prefill_s": round(prefill_s, 4),
        "prefill_tokens_per_s": round(prompt_length / prefill_s, 1),
        "step_ms": round(1e3 * step_s, 4),
        "decode_tokens_per_s": round(batch / step_s, 1),
        "tokens_per_s": round(batch * num_new / (batch * prefill_s + num_new * step_s), 2),
    }


def main() -> int:
    """Measure both models and print one JSON line for each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_context", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", type=int, default=65536, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--new", type=int, default=1024, help="new tokens (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=128, help="steps that are timed (default: %(default)s)")
    parser.add_argument("--prefill-tokens", type=int, default=8192, help="tokens of a piece of the prompt (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small models, 512 tokens in, 64 out")
    arguments = parser.parse_args()
    silence_known_warnings()
    if arguments.tiny:
        arguments.prompt, arguments.new, arguments.steps, arguments.prefill_tokens = 512, 64, 16, 128
    hybrid = ModelConfig(**(TINY if arguments.tiny else HYBRID_2B))
    substrate = initialize(make_run(hybrid, "bf16"))
    print(json.dumps({"device": device_name(substrate.device), "torch": torch.__version__}), flush=True)
    rates = {}
    for name, config in (("hybrid", hybrid), ("transformer", transformer_like(hybrid))):
        report = measure(
            config,
            substrate,
            prompt_length=arguments.prompt,
            num_new=arguments.new,
            num_steps=arguments.steps,
            prefill_tokens=arguments.prefill_tokens,
        )
        rates[name] = report["tokens_per_s"]
        print(json.dumps({"model": name} | report), flush=True)
        gc.collect()
        if substrate.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    print(json.dumps({"hybrid_is_times": round(rates["hybrid"] / rates["transformer"], 2)}), flush=True)
    shutdown(substrate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
