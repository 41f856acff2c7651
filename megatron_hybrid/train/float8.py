"""The float8 side of training: scales that follow the optimizer steps, and their place in checkpoints.

Everything here does nothing at all for a run whose linears are not in float8.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.parallel_state import get_amax_reduction_group

from megatron_hybrid.checkpoint.agreement import gather
from megatron_hybrid.checkpoint.sharding import shard_copies
from megatron_hybrid.config import Fp8Config
from megatron_hybrid.fp8.linear import Float8Linear
from megatron_hybrid.fp8.state import ScalingState
from megatron_hybrid.layers.linear import NormColumnParallelLinear, ResidualRowParallelLinear
from megatron_hybrid.substrate.context import Substrate

_log = logging.getLogger(__name__)


def float8_linears(chunks: Sequence[torch.nn.Module]) -> list[Float8Linear]:
    """The float8 linears of this rank, in model order."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Float8Linear)]


@contextlib.contextmanager
def held_weights(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Cast every float8 weight once, and use these casts within: over the micro-batches of a step the weights stay what they are.

    Not with overlapped gathers, where the weights of this step are there only once forward needs them; and not of linears that multiply by
    something made of their weight.
    """
    linears = (NormColumnParallelLinear, ResidualRowParallelLinear)
    modules = [] if chunks[0].ddp_config.overlap_param_gather else [module for chunk in chunks for module in chunk.modules()]
    owners = [module for module in modules if isinstance(module, linears) and isinstance(module.product, Float8Linear)]
    for owner in owners:
        owner.product.hold_weight(owner.weight)
    try:
        yield
    finally:
        for owner in owners:
            owner.product.release_weight()


def is_observed(chunks: Sequence[torch.nn.Module]) -> bool:
    """Whether statistics of the casts are being gathered."""
    return any(linear.statistics_RS is not None for linear in float8_linears(chunks))


def with_scale_update(finish_gradients: Callable[..., None], chunks: Sequence[torch.nn.Module]) -> Callable[..., None]:
    """What finishes a step's gradients, and then makes the next step's scales."""
    delayed = [linear for linear in float8_linears(chunks) if linear.recipe.recipe == "delayed"]
    if not delayed:
        return finish_gradients
    state = ScalingState(delayed)
    group = get_amax_reduction_group(tp_only_amax_red=state.delayed.reduction == "tensor")

    def finish(*arguments: Any, **options: Any) -> None:
        finish_gradients(*arguments, **options)
        state.finish_step(group)

    return finish


class ScalingCheckpoint:
    """Saves histories and scales of delayed scaling, and decides what of a checkpoint's a run can use. Collective over all ranks.

    Histories and scales are the same on every tensor rank, and on every data rank too where those share amaxes, so that any layout reads
    them back; otherwise each data rank has its own, and the number of data ranks must stay. A state of another recipe is not converted:
    histories start empty and scales at 1, as in a new run, with a warning. Linears that run in float8 there or here alone, as another
    tensor cut may bring about, are treated in the same way one by one.
    """

    def __init__(self, recipe: Fp8Config, chunks: Sequence[torch.nn.Module], substrate: Substrate) -> None:
        self.substrate = substrate
        self.linears = float8_linears(chunks) if recipe.recipe == "delayed" else []
        self.kind: dict[str, Any] | None = None
        self.names: list[str] = []
        if recipe.recipe == "delayed":
            self.kind = {"format": recipe.format, **recipe.delayed.model_dump(mode="json")}
            if recipe.delayed.reduction == "tensor":
                self.kind["data_ranks"] = substrate.data_size
            names = gather([linear.name for linear in self.linears], substrate.control_group)
            self.names = sorted({name for of_rank in names for name in of_rank})

    def header(self) -> dict[str, Any]:
        """What the checkpoint's header says of the state; nothing where there is none."""
        return {} if self.kind is None else {"fp8": {"kind": self.kind, "linears": self.names}}

    def sharded(self) -> dict[str, dict[str, ShardedTensor]]:
        """The section to save; nothing where there is no state."""
        return {} if self.kind is None else {"fp8": self._shard(self.linears)}

    def wanted(self, header: dict[str, Any]) -> dict[str, dict[str, ShardedTensor]]:
        """The section to load from a checkpoint with this header; what is ignored or starts anew is said on rank 0."""
        usable, warnings = self._usable(header.get("fp8"))
        if self.substrate.rank == 0:
            for warning in warnings:
                _log.warning("%s", warning)
        return {"fp8": self._shard([linear for linear in self.linears if linear.name in usable])} if usable else {}

    def take(self, loaded: dict[str, Any]) -> None:
        """Take over what was loaded."""
        section = loaded.get("fp8", {})
        for linear in self.linears:
            history, scale = (section.get(key) for key in _tensors(linear))
            if history is not None:
                linear.amax_history_RH.copy_(history.view_as(linear.amax_history_RH))
                linear.set_scales(scale.view_as(linear.scale_R))

    def _usable(self, saved: dict[str, Any] | None) -> tuple[set[str], list[str]]:
        """Names of the linears whose saved state fits, and what to say about the rest."""
        anew = "amax histories start empty and scales at 1"
        if saved is None:
            return set(), [] if self.kind is None else [f"the checkpoint has no float8 scaling state: {anew}"]
        if self.kind is None:
            return set(), ["the checkpoint's float8 scaling state is ignored: this run keeps none"]
        if saved["kind"] != self.kind:
            there, here = (
                {name: kind.get(name) for name in sorted(saved["kind"].keys() | self.kind.keys())} for kind in (saved["kind"], self.kind)
            )
            differences = [f"{name} is {there[name]} there and {here[name]} here" for name in there if there[name] != here[name]]
            return set(), [f"the checkpoint's float8 scaling state is of another kind ({'; '.join(differences)}): {anew}"]
        warnings = []
        if added := sorted(set(self.names) - set(saved["linears"])):
            warnings.append(f"the checkpoint has no float8 scaling state of {', '.join(added)}: {anew} there")
        if dropped := sorted(set(saved["linears"]) - set(self.names)):
            warnings.append(f"the checkpoint's float8 scaling state of {', '.join(dropped)} is ignored: they are not in float8 here")
        return set(self.names) & set(saved["linears"]), warnings

    def _shard(self, linears: Sequence[Float8Linear]) -> dict[str, ShardedTensor]:
        tensors = {key: tensor for linear in linears for key, tensor in _tensors(linear).items()}
        differ_by_data_rank = self.kind is not None and self.kind["reduction"] == "tensor"
        return shard_copies(tensors, self.substrate.tensor_group, self.substrate.data_group, differ_by_data_rank=differ_by_data_rank)


def _tensors(linear: Float8Linear) -> dict[str, torch.Tensor]:
    return {f"fp8.{linear.name}.amax_history": linear.amax_history_RH, f"fp8.{linear.name}.scale": linear.scale_R}
