"""Times decoding on the device at hand, with full caches: one layer of each kind for the latency model, and whole models."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from megatron_hybrid.config import ModelConfig, RunConfig
from megatron_hybrid.generate.engine import new_cache
from megatron_hybrid.generate.step import Here, describe_position, embed, logits_of, run_layer, run_layers
from megatron_hybrid.layers.specs import ops_for
from megatron_hybrid.layout.pattern import ATTENTION, MAMBA, MLP
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.ops.decode import DecodeOps, decode_ops_for
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from tools.minipuzzle.config import LatencyConfig
from tools.minipuzzle.latency import LatencyModel, LayerTimes, fit_line
from tools.minipuzzle.search import Widths

_WARM_UP = 3


@torch.inference_mode()
def measure_latency(
    run: RunConfig, substrate: Substrate, setting: LatencyConfig, widths: list[Widths], ffn_hidden_sizes: tuple[int, ...]
) -> LatencyModel:
    """Return times of every layer kind at every choice of widths, medians of ``setting.repetitions`` steps.

    Args:
        run: has the parent's model, the layout (its tensor ranks take part) and the precision.
        substrate: this rank.
        setting: context, batch and repetitions.
        widths: hidden size and Mamba shape of each choice.
        ffn_hidden_sizes: MLP widths; the smallest and the largest are measured.
    """
    times = []
    for choice in widths:
        points = []
        for width in sorted({min(ffn_hidden_sizes), max(ffn_hidden_sizes)}):
            # One layer of each kind, of random weights: time does not depend on them.
            changes = vars(choice) | {"pattern": MAMBA + ATTENTION + MLP, "ffn_hidden_size": width}
            model = ModelConfig.model_validate(run.model.model_dump() | changes)
            fixed, by_kind = _measure_layers(run.model_copy(update={"model": model}), substrate, setting)
            points.append((width, by_kind[MLP]))
        base, per_neuron = fit_line(points)
        times.append(LayerTimes(*vars(choice).values(), fixed, by_kind[ATTENTION], by_kind[MAMBA], base, per_neuron))
    return LatencyModel(_device_name(substrate), run.train.precision, setting.context_tokens, setting.batch_size, tuple(times))


@dataclass(frozen=True)
class DecodeTime:
    """One model's decoding, as timed."""

    device: str
    precision: str
    context_tokens: int
    batch_size: int
    decode_ms: float
    memory_gib: float
    peak_gib: float | None


@torch.inference_mode()
def time_decoding(runs: Mapping[str, RunConfig], substrate: Substrate, setting: LatencyConfig) -> dict[str, DecodeTime]:
    """Time decoding steps of several models, each with caches full up to ``setting.context_tokens``; one rank.

    Weights are random and caches filled with noise, since time does not depend on them, so that no prompt has to be read. Models stand on
    the device one at a time.
    """
    timed = {}
    for name, run in runs.items():
        if substrate.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(substrate.device)
        model = random_model(run, substrate)
        caches, here = _full_caches(model, substrate, setting)
        decode_ms = _time(partial(_step, model, caches, here, decode_ops_for(substrate.device)), substrate, setting.repetitions)
        buffers = [buffer for cache in caches if cache is not None for buffer in vars(cache).values()]
        size_bytes = sum(tensor.nbytes for tensor in [*model.parameters(), *buffers])
        peak_gib = torch.cuda.max_memory_allocated(substrate.device) / 2**30 if substrate.device.type == "cuda" else None
        timed[name] = DecodeTime(
            _device_name(substrate),
            run.train.precision,
            setting.context_tokens,
            setting.batch_size,
            decode_ms,
            size_bytes / 2**30,
            peak_gib,
        )
        del model, caches, buffers
    return timed


def _device_name(substrate: Substrate) -> str:
    return torch.cuda.get_device_name(substrate.device) if substrate.device.type == "cuda" else "cpu"


def random_model(run: RunConfig, substrate: Substrate) -> HybridModel:
    """Return a whole model on this rank with random weights, for timing."""
    config = build_transformer_config(run, substrate)
    model = HybridModel(
        run.model,
        config,
        ops_for(substrate.device, config.params_dtype, choices=run.kernels),
        layer_range=(0, run.model.num_layers),
        is_first_stage=True,
        is_last_stage=True,
    )
    model.to(substrate.device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.01)
    return model


def _step(model: HybridModel, caches: list, here: Here, ops: DecodeOps) -> None:
    logits_of(model, run_layers(model, embed(model, torch.zeros_like(here.position_B)), caches, here, ops), ops)


def _full_caches(model: HybridModel, substrate: Substrate, setting: LatencyConfig) -> tuple[list, Here]:
    """Caches full of noise up to the context's last token but one, and the position of that token."""
    caches = [new_cache(layer, setting.batch_size, setting.context_tokens) for layer in model.decoder.layers]
    for cache in caches:
        for buffer in vars(cache).values() if cache is not None else ():
            buffer.normal_(0.0, 0.01)
    position_B = torch.full((setting.batch_size,), setting.context_tokens - 1, dtype=torch.int64, device=substrate.device)
    return caches, describe_position(model, position_B, torch.ones_like(position_B, dtype=torch.bool))


def _measure_layers(run: RunConfig, substrate: Substrate, setting: LatencyConfig) -> tuple[float, dict[str, float]]:
    """Milliseconds of what is not in the layers, and of one layer of each kind."""
    model = random_model(run, substrate)
    caches, here = _full_caches(model, substrate, setting)
    token_B, ops = torch.zeros_like(here.position_B), decode_ops_for(substrate.device)
    hidden_BD = embed(model, token_B)
    by_kind = {
        kind: _time(lambda layer=layer, cache=cache: run_layer(layer, hidden_BD, cache, here, ops), substrate, setting.repetitions)
        for kind, layer, cache in zip(run.model.layer_kinds, model.decoder.layers, caches, strict=True)
    }
    return _time(lambda: logits_of(model, embed(model, token_B), ops), substrate, setting.repetitions), by_kind


def _time(call: Callable[[], object], substrate: Substrate, repetitions: int) -> float:
    """Median milliseconds of a call; on a GPU as a CUDA graph, which is how decoding runs there."""
    for _ in range(_WARM_UP):
        call()
    if substrate.device.type == "cuda" and substrate.world_size == 1:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(substrate.device)
        with torch.cuda.graph(graph):
            call()
        call = graph.replay
    elapsed = []
    for _ in range(repetitions):
        if substrate.device.type == "cuda":
            torch.cuda.synchronize(substrate.device)
        start_s = time.perf_counter()
        call()
        if substrate.device.type == "cuda":
            torch.cuda.synchronize(substrate.device)
        elapsed.append(1e3 * (time.perf_counter() - start_s))
    return statistics.median(elapsed)
