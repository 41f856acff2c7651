"""Models with random weights on this host, for the benchmarks of generation: nothing is read, and no weight is drawn on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_hybrid.config import ModelConfig, RunConfig
from megatron_hybrid.convert.correspondence import correspondences
from megatron_hybrid.convert.native import run_of
from megatron_hybrid.convert.rearrange import to_hub
from megatron_hybrid.generate.load import build_stage
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.substrate.context import Substrate

HYBRID_2B = {
    # The layers of Nemotron-H 8B at half its width: 2,101,246,464 parameters.
    "pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    "hidden_size": 2048,
    "ffn_hidden_size": 8192,
    "num_attention_heads": 16,
    "num_kv_heads": 8,
    "head_dim": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "mamba_num_groups": 8,
    "mamba_state_dim": 128,
    "vocab_size": 131072,
}


def make_run(model: ModelConfig, precision: str) -> RunConfig:
    """A run of one rank; nothing reads its paths."""
    run = run_of(model, Path("unused"), precision=precision)
    return run.model_copy(update={"runtime": run.runtime.model_copy(update={"deterministic": False})})


def random_model(run: RunConfig, substrate: Substrate, *, seed: int = 0) -> HybridModel:
    """All of a model: large matrices are drawn where they are, the rest as training starts from it."""
    model = build_stage(run, substrate)
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=run.model.init_std)
            else:
                drawn = parameter.declaration.initializer(generator, tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(np.asarray(drawn, dtype=np.float32)))
    return model


def hub_weights(model: HybridModel, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The weights under transformers' names."""
    ours = dict(model.named_global_parameters())
    theirs = {}
    for each in correspondences(config):
        native = ours[each.parameter].detach().split([tensor.shape[0] for tensor in each.native])
        theirs |= {description.name: tensor for description, tensor in zip(each.hub, to_hub(each, native, config), strict=True)}
    return theirs


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def device_name(device: torch.device) -> str:
    """What the figures are of."""
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second, reads and writes together, that a copy of 1 GiB (on a CPU 64 MiB) reaches: the best of 20."""
    import time

    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    best_s = float("inf")
    for _ in range(20):
        synchronize(device)
        start_s = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * source.nbytes / best_s
