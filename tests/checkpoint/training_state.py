"""A real model and optimizer whose every value is known from its global name, whatever the layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_hybrid.checkpoint.sharding import shard_parameters
from megatron_hybrid.config import RunConfig
from megatron_hybrid.layers.parameters import normal
from megatron_hybrid.model.build import build_chunks
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.model.initialize import initialize_parameters
from megatron_hybrid.substrate.groups import initialize
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from megatron_hybrid.train.mended_optimizers import sharded_state
from megatron_hybrid.train.optimizer import build_optimizer, wrap_data_parallel

NUM_STEPS = 7.0


@dataclass(frozen=True)
class Layout:
    """A cut of the model, and the ranks it takes."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    data: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        return f"tp{self.tensor} pp{self.pipeline}x{self.virtual_pipeline} dp{self.data}"


@dataclass(frozen=True)
class Kind:
    """What decides the kind of optimizer state."""

    precision: str
    distributed: bool

    def __str__(self) -> str:
        return f"{self.precision} {'distributed' if self.distributed else 'plain'}"


class TrainingState:
    """Model chunks and optimizer of one rank."""

    def __init__(self, layout: Layout, kind: Kind, *, seed: int) -> None:
        self.run = small_run(layout, kind, seed)
        self.substrate = initialize(self.run)
        config = build_transformer_config(self.run, self.substrate)
        self.chunks = wrap_data_parallel(build_chunks(self.run, config, self.substrate), self.run, config)
        self.optimizer = build_optimizer(self.chunks, self.run)

    @property
    def models(self) -> list[HybridModel]:
        return [chunk.module for chunk in self.chunks]

    def sharded_model(self) -> dict[str, Any]:
        sharded: dict[str, Any] = {}
        for model in self.models:
            sharded |= shard_parameters(model.named_global_parameters(), self.substrate.tensor_group, self.substrate.data_group)
        return sharded

    def sharded(self, *, is_loading: bool) -> dict[str, Any]:
        model = self.sharded_model()
        return {"model": model, "optimizer": sharded_state(self.optimizer, model, is_loading=is_loading)}

    @torch.no_grad()
    def take(self, loaded: dict[str, Any]) -> None:
        for model in self.models:
            for name, parameter in model.named_global_parameters():
                parameter.copy_(loaded["model"][name])
        self.optimizer.load_state_dict(loaded["optimizer"])

    @torch.no_grad()
    def fill(self, seed: int) -> None:
        """Give every weight, master, moment and step count its known value."""
        for _, live, expected in self.values(seed):
            live.copy_(expected)

    def differences(self, seed: int) -> list[str]:
        """Names of the values that are not bitwise the known ones."""
        return [name for name, live, expected in self.values(seed) if not torch.equal(live, expected.to(live.dtype))]

    def values(self, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, live tensor and known value of all that this rank holds."""
        for model in self.models:
            for name, parameter in model.named_global_parameters():
                master = self._known(f"{name} master", parameter, seed)
                yield f"{name} weight", parameter.data, master.to(parameter.dtype)
                for optimizer in self.optimizer.chained_optimizers:
                    yield from self._optimizer_values(optimizer, name, parameter, master, seed)

    def _optimizer_values(
        self, optimizer: MegatronOptimizer, name: str, parameter: torch.nn.Parameter, master: Tensor, seed: int
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        held, own = slice(None), getattr(parameter, "main_param", parameter)
        if isinstance(optimizer, DistributedOptimizer):
            shards = {id(model): shard for model, shard in _distributed_shards(optimizer)}
            if id(parameter) not in shards:
                return
            part = optimizer._get_model_param_range_map(parameter)["param"]
            held, own = slice(part.start, part.end), shards[id(parameter)]
        state = optimizer.optimizer.state[own]
        yield f"{name} master", own.data, master.flatten()[held].view_as(own)
        for moment in ("exp_avg", "exp_avg_sq"):
            known = self._known(f"{name} {moment}", parameter, seed)
            yield f"{name} {moment}", state[moment], known.flatten()[held].view_as(state[moment])
        yield f"{name} step", state["step"], torch.tensor(NUM_STEPS)

    def _known(self, name: str, parameter: torch.nn.Parameter, seed: int) -> Tensor:
        known = torch.nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32))
        known.declaration = replace(parameter.declaration, initializer=normal(1.0))
        initialize_parameters(
            [(name, known)],
            seed=seed,
            tensor_rank=self.substrate.tensor_rank,
            tensor_ranks=self.substrate.tensor_size,
            num_threads=1,
        )
        return known.detach()


def _distributed_shards(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Each parameter this rank updates a part of, with the fp32 tensor of that part."""
    fp32 = optimizer.model_fp32_groups, optimizer.shard_fp32_groups
    float16 = optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups
    for model_groups, shard_groups in (fp32, float16):
        for model_group, shard_group in zip(model_groups, shard_groups, strict=True):
            yield from zip(model_group, shard_group, strict=True)


def small_run(layout: Layout, kind: Kind, seed: int) -> RunConfig:
    """Four of each layer kind's dimensions, so that four tensor ranks have one of each; nothing reads its files."""
    return RunConfig(
        run_dir=Path("run"),
        seed=seed,
        model={
            "pattern": "M-M*M-M*", "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 8, "num_kv_heads": 4, "head_dim": 8,
            "mamba_num_heads": 8, "mamba_head_dim": 8, "mamba_num_groups": 4, "mamba_state_dim": 4, "vocab_size": 100,
        },
        data={"sources": {"text": Path("text")}, "sequence_length": 32},
        optimizer={"lr": 1e-3},
        train={"steps": 2, "global_batch_size": 8, "precision": kind.precision},
        parallel={
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "virtual_pipeline": layout.virtual_pipeline,
            "data": layout.data,
            "distributed_optimizer": kind.distributed,
        },
        runtime={"timeout_s": 60.0},
    )  # fmt: skip
