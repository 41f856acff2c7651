"""How good a model is on held-out text: loss, next-token accuracy, and greedy agreement with the parent.

A candidate that only lacks layers and neurons is run as the parent with these left out: one set of weights serves all candidates, in any
layout. One whose norms run over other channels (Mamba heads, embedding channels) is cut from the checkpoint and run by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from torch import Tensor

from megatron_hybrid.checkpoint.agreement import gather
from megatron_hybrid.convert.source import Source
from megatron_hybrid.data.loader import MicroBatch
from megatron_hybrid.layers.mlp import MlpLayer
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.substrate.context import Substrate
from tools.minipuzzle.forward import StageForward, activation_replaced
from tools.minipuzzle.pruning import Selection

_ROWS_PER_CHUNK = 512

Predictions = dict[tuple[str, int], np.ndarray]
"""(source, sample) -> the greedy next tokens int32 [L]; on the last stage alone."""


@dataclass(frozen=True)
class Quality:
    """Means over the tokens that count."""

    loss: float
    """Cross entropy per token, nats."""
    accuracy: float
    """Share of tokens that the greedy choice hits."""
    agreement: float | None
    """Share of tokens where the greedy choice is the parent's; None for the parent."""


@torch.no_grad()
def measure_quality(
    stage: StageForward,
    batches: Iterable[tuple[str, MicroBatch]],
    num_samples: int,
    *,
    parent_says: Predictions | None = None,
    keep: Predictions | None = None,
    selection: Selection | None = None,
    advance: Callable[[int], None] = lambda num_samples: None,
) -> Quality:
    """Run a model over held-out text; collective, the same result on every rank.

    Args:
        stage: this rank's part of the model.
        batches: (source, micro-batch) of this data rank.
        num_samples: per source; those at and beyond this index are left out.
        parent_says: the parent's choices, to compare with.
        keep: filled with this model's choices.
        selection: run only these layers and neurons of the model.
        advance: told how many samples of this rank are done.
    """
    sums = np.zeros(4)
    with _leaving_out(stage.chunk, selection, stage.substrate):
        for source, batch in batches:
            (hidden_LBD,) = stage.enter(batch)
            sequence = stage.describe(batch)
            for number, layer in enumerate(stage.chunk.decoder.layers, stage.chunk.decoder.first_layer):
                if selection is None or number in selection.layers:
                    hidden_LBD = layer(hidden_LBD, sequence)
            for last_LBD in stage.leave([hidden_LBD]):
                sums += _count(stage, source, batch, num_samples, last_LBD, parent_says, keep)
            advance(batch.tokens.shape[0])
    own = sums if stage.chunk.post_process and stage.substrate.tensor_rank == 0 else np.zeros(4)
    tokens, loss, hits, agreements = np.sum(gather(own, stage.substrate.control_group), axis=0).tolist()
    return Quality(loss / tokens, hits / tokens, None if parent_says is None else agreements / tokens)


def load_cut(chunk: HybridModel, source: Source, substrate: Substrate) -> None:
    """Fill a chunk with the tensors of a source, each rank with its own part."""
    with torch.no_grad():
        for name, parameter in chunk.named_global_parameters():
            declaration = parameter.declaration
            if declaration.axis is None:
                parameter.copy_(source.read(name))
                continue
            keys = [f"{name}.{component.name}" if component.name else name for component in declaration.components]
            parts = [source.read(key).chunk(substrate.tensor_size, declaration.axis)[substrate.tensor_rank] for key in keys]
            parameter.copy_(torch.cat(parts, declaration.axis))


def _count(
    stage: StageForward,
    source: str,
    batch: MicroBatch,
    num_samples: int,
    last_LBD: Tensor,
    parent_says: Predictions | None,
    keep: Predictions | None,
) -> np.ndarray:
    """Sums over the tokens of a micro-batch: weight, loss, hits, agreements."""
    head = stage.chunk.output_layer
    labels_BL, weight_BL = batch.labels.to(last_LBD.device), batch.loss_mask.to(last_LBD.device)
    weight_BL = weight_BL * (batch.indices < num_samples).to(weight_BL)[:, None]
    _, losses_LB = head.ops.linear_cross_entropy(
        last_LBD, head.weight, labels_BL.t(), weight_BL.t(), vocab_size=head.vocab_size, group=get_tensor_model_parallel_group()
    )
    rows = max(1, _ROWS_PER_CHUNK // last_LBD.shape[1])
    greedy_BL = torch.cat([head.logits(part_LBD).argmax(-1) for part_LBD in last_LBD.split(rows)], dim=1)
    agrees_BL = torch.zeros_like(weight_BL)
    for row, index in enumerate(batch.indices.tolist()):
        if keep is not None:
            keep[source, index] = greedy_BL[row].int().cpu().numpy()
        if parent_says is not None and index < num_samples:
            agrees_BL[row] = greedy_BL[row] == torch.from_numpy(parent_says[source, index]).to(greedy_BL)
    values = (torch.ones_like(weight_BL), losses_LB.t(), greedy_BL == labels_BL, agrees_BL)
    return np.array([float((value.double() * weight_BL).sum()) for value in values])


@contextlib.contextmanager
def _leaving_out(chunk: HybridModel, selection: Selection | None, substrate: Substrate) -> Iterator[None]:
    """Silence the neurons that a selection does not keep: without its activation a neuron is not there."""
    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(chunk.decoder.layers, chunk.decoder.first_layer):
            if selection is not None and isinstance(layer, MlpLayer) and number in selection.neurons:
                stack.enter_context(activation_replaced(layer, _silence(layer, selection.neurons[number], substrate)))
        yield


def _silence(layer: MlpLayer, kept: np.ndarray, substrate: Substrate) -> Callable[[Tensor], Tensor]:
    weight = layer.mlp.linear_fc2.weight
    width = weight.shape[1]
    mask_F = torch.zeros(width * substrate.tensor_size, dtype=weight.dtype)
    mask_F[torch.from_numpy(kept)] = 1
    own_F = mask_F[substrate.tensor_rank * width :][:width].to(weight.device)
    return lambda activated_LBF: activated_LBF * own_F
