"""How much layers, neurons, heads and channels matter, by forward passes alone (arXiv 2504.03624, section 3.1; 2504.11409, section 3).

A layer's importance is the mean squared change of the last hidden state (after the final norm, before the output layer) when the layer is
left out. One sweep over the layers finds all of them: beside the whole model's state it carries one variant for every layer passed so
far, which is the state without that layer. A variant shares everything before its layer with the whole model, so that N layers take
N + N (N - 1) / 2 layer passes instead of the N (N + 1) of N + 1 sweeps: half. Every layer's weights are read once.

Neurons, heads and channels are scored by their activations: mean of absolute values over the sequence, L2 over samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megatron_hybrid.checkpoint.agreement import gather
from megatron_hybrid.data.loader import MicroBatch
from megatron_hybrid.layers.linear import NormColumnParallelLinear
from megatron_hybrid.layers.mamba import MambaLayer
from megatron_hybrid.layers.mlp import MlpLayer
from megatron_hybrid.layers.norm import Norm
from megatron_hybrid.substrate.context import Substrate
from tools.minipuzzle.config import Axis
from tools.minipuzzle.forward import StageForward, activation_replaced


@torch.no_grad()
def measure_layers(
    stage: StageForward, batches: Iterable[MicroBatch], num_samples: int, num_layers: int, advance: Callable[[int], None]
) -> np.ndarray:
    """Return [samples, layers] mean squared changes, float64, in the order of samples; the same on every rank, whatever the layout.

    Args:
        stage: this rank's part of the model.
        batches: of this data rank.
        num_samples: samples over all ranks.
        num_layers: layers of the whole model.
        advance: told how many samples of this rank are done.
    """
    own: dict[int, np.ndarray] = {}
    for batch in batches:
        mse_BL = sweep(stage, batch)
        if mse_BL is not None and stage.substrate.tensor_rank == 0:
            own |= dict(zip(batch.indices.tolist(), mse_BL.double().cpu().numpy(), strict=True))
        advance(batch.tokens.shape[0])
    found = {index: row for of_rank in gather(own, stage.substrate.control_group) for index, row in of_rank.items()}
    return np.stack([found[index] for index in range(num_samples)]).reshape(num_samples, num_layers)


def sweep(stage: StageForward, batch: MicroBatch) -> Tensor | None:
    """Return each sample's changes [B, layers], fp32, on the last stage; None before it."""
    sequence = stage.describe(batch)
    # The whole model's state, then those without layer 0, 1, 2...
    variants = stage.enter(batch, 1 + stage.chunk.decoder.first_layer)
    for layer in stage.chunk.decoder.layers:
        without = variants[0]
        variants = [layer(hidden_LBD, sequence) for hidden_LBD in variants]
        variants.append(without)
    variants = stage.leave(variants)
    if not variants:
        return None
    whole_LBD = variants[0].float()
    return torch.stack([(hidden_LBD.float() - whole_LBD).square().mean((0, 2)) for hidden_LBD in variants[1:]], dim=1)


@dataclass
class WidthScores:
    """Scores along the widths, of the whole model."""

    neurons: dict[int, np.ndarray]
    mamba: dict[int, np.ndarray]
    hidden: np.ndarray | None


@torch.no_grad()
def measure_widths(
    stage: StageForward,
    batches: Iterable[MicroBatch],
    num_samples: int,
    axes: Iterable[Axis],
    advance: Callable[[int], None],
) -> WidthScores:
    """Return the scores of neurons, heads and channels that ``axes`` ask for; the same on every rank, whatever the layout.

    Args:
        stage: this rank's part of the model.
        batches: of this data rank.
        num_samples: samples over all ranks; those at and beyond this index are left out.
        axes: what to score.
        advance: told how many samples of this rank are done.
    """
    watch = _ActivationWatch(stage, set(axes))
    try:
        for batch in batches:
            watch.counts = batch.indices < num_samples
            sequence = stage.describe(batch)
            (hidden_LBD,) = stage.enter(batch)
            for layer in stage.chunk.decoder.layers:
                hidden_LBD = layer(hidden_LBD, sequence)
            stage.leave([hidden_LBD])
            advance(batch.tokens.shape[0])
    finally:
        watch.close()
    return _assemble(gather((stage.substrate.tensor_rank, watch.energies()), stage.substrate.control_group), stage.substrate)


class _ActivationWatch:
    """Adds up, over samples, the squares of what passes certain places of one stage: place -> float64 sums of this rank's part."""

    def __init__(self, stage: StageForward, axes: set[Axis]) -> None:
        self.counts: Tensor = torch.empty(0)
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._exits = contextlib.ExitStack()
        decoder = stage.chunk.decoder
        for number, layer in enumerate(decoder.layers, decoder.first_layer):
            if "ffn" in axes and isinstance(layer, MlpLayer):
                self._exits.enter_context(activation_replaced(layer, self._watch_neurons(number)))
            if "mamba" in axes and isinstance(layer, MambaLayer):
                self._watch(layer.register_forward_pre_hook(self._watch_heads(number)))
            if "hidden" in axes:
                (linear,) = (module for module in layer.modules() if isinstance(module, NormColumnParallelLinear))
                self._watch(layer.register_forward_pre_hook(self._watch_channels(number, linear)))
        if "hidden" in axes and isinstance(decoder.final_norm, Norm):
            self._watch(decoder.final_norm.register_forward_hook(self._watch_final(decoder.first_layer + len(decoder.layers))))

    def close(self) -> None:
        """Stop watching."""
        self._exits.close()

    def energies(self) -> dict[tuple[str, int], np.ndarray]:
        """The sums so far."""
        return {place: total.cpu().numpy() for place, total in self._sums.items()}

    def _watch(self, handle: RemovableHandle) -> None:
        self._exits.callback(handle.remove)

    def _add(self, axis: str, layer: int, activation_LB: Tensor) -> None:
        """Take an activation [L, B, ...]."""
        means_B = activation_LB.abs().mean(0, dtype=torch.float32).double()
        total = means_B[self.counts.to(means_B.device)].square().sum(0)
        self._sums[axis, layer] = self._sums.get((axis, layer), 0) + total

    def _watch_neurons(self, layer: int) -> Callable[[Tensor], Tensor]:
        def watch(activated_LBF: Tensor) -> Tensor:
            self._add("neurons", layer, activated_LBF)
            return activated_LBF

        return watch

    def _watch_heads(self, number: int) -> Callable:
        def hook(layer: MambaLayer, inputs: tuple[Tensor, ...]) -> None:
            # Projected once more: what a mixer does with its input is its own affair.
            mixer = layer.mixer
            inner = mixer.in_proj_sizes[0]
            x_LBI = mixer.in_proj(inputs[0])[..., inner : 2 * inner]
            self._add("mamba", number, x_LBI.unflatten(-1, (mixer.num_heads, mixer.head_dim)))

        return hook

    def _watch_channels(self, number: int, linear: NormColumnParallelLinear) -> Callable:
        def hook(layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._add("hidden", number, linear.rms_norm(inputs[0], linear.layer_norm_weight, linear.eps))

        return hook

    def _watch_final(self, number: int) -> Callable:
        return lambda module, inputs, output_LBD: self._add("hidden", number, output_LBD)


def _assemble(of_ranks: list[tuple[int, dict[tuple[str, int], np.ndarray]]], substrate: Substrate) -> WidthScores:
    """Add data ranks, join tensor ranks, and take the roots."""
    sums: dict[tuple[str, int], dict[int, np.ndarray]] = {}
    for tensor_rank, energies in of_ranks:
        for place, energy in energies.items():
            parts = sums.setdefault(place, {})
            parts[tensor_rank] = parts.get(tensor_rank, 0) + energy
    joined = {
        # Norms are whole on every tensor rank; neurons and heads are cut, in order.
        place: np.sqrt(parts[0] if place[0] == "hidden" else np.concatenate([parts[rank] for rank in range(substrate.tensor_size)]))
        for place, parts in sorted(sums.items())
    }
    hidden = [values for (axis, _), values in joined.items() if axis == "hidden"]
    return WidthScores(
        neurons={layer: values for (axis, layer), values in joined.items() if axis == "neurons"},
        mamba={layer: values for (axis, layer), values in joined.items() if axis == "mamba"},
        hidden=np.sum(hidden, axis=0) if hidden else None,
    )
