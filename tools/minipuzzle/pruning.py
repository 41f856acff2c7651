"""Which parts of a parent a candidate consists of, and how they are cut out of its tensors.

Axes and the tensors they run through:

    hidden     columns of everything that reads the residual stream, rows of everything that writes it, and the norms over it
    neurons    rows of linear_fc1, columns of linear_fc2
    heads      rows of z, x and dt in in_proj, of x in the convolution, columns of out_proj; the gated norm, A_log, D and dt_bias
    channels   as heads, within each head

Mamba-2's B and C belong to groups of heads and are the same for all heads of a group (arXiv 2504.11409, section 3). Hence the group rules:
rows of B and C stay whole; every group keeps the same number of heads, its own best ones; and which channels of a head are kept is one
choice for all heads of a layer, since the state's rows are addressed by it. Channels are chosen first, by their L2 over heads, and heads
by their L2 over the channels that remain. What is kept stands in its old order, so that a full-width prune changes no bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.layout.pattern import MAMBA, MLP
from tools.minipuzzle.candidate import Candidate
from tools.minipuzzle.scores import Scores, arrays_digest

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Selection:
    """What is kept, as indices into the parent."""

    layers: tuple[int, ...]
    hidden: np.ndarray
    """[hidden kept]"""
    neurons: Mapping[int, np.ndarray]
    """The parent's MLP layer -> [its width]"""
    heads: Mapping[int, np.ndarray]
    """The parent's Mamba layer -> [heads kept], group by group."""
    channels: Mapping[int, np.ndarray]
    """The parent's Mamba layer -> [channels kept], the same for all its heads."""

    @property
    def digest(self) -> str:
        """A digest of what is kept."""
        by_layer = {"neurons": self.neurons, "heads": self.heads, "channels": self.channels}
        arrays = {f"{name}.{layer}": kept for name, of_layers in by_layer.items() for layer, kept in of_layers.items()}
        return arrays_digest({"layers": np.array(self.layers), "hidden": self.hidden, **arrays})


def select_parts(parent: ModelConfig, candidate: Candidate, scores: Scores | None) -> Selection:
    """Return the parts a candidate keeps: by scores, of equals the earlier; ``scores`` may be None where every width is whole.

    Raises:
        ValueError: a width is not whole and was not scored.
    """
    kept_by_mlp = dict(
        zip((layer for layer in candidate.layers if parent.layer_kinds[layer] == MLP), candidate.ffn_hidden_sizes, strict=True)
    )
    neurons = {
        layer: keep_best(_of(scores and scores.neurons.get(layer), parent.ffn_hidden_size, kept, f"neurons of layer {layer}"), kept)
        for layer, kept in kept_by_mlp.items()
    }
    heads, channels = {}, {}
    for layer in (layer for layer in candidate.layers if parent.layer_kinds[layer] == MAMBA):
        is_whole = (candidate.mamba_num_heads, candidate.mamba_head_dim) == (parent.mamba_num_heads, parent.mamba_head_dim)
        score_HP = None if scores is None else scores.mamba.get(layer)
        if score_HP is None and not is_whole:
            raise ValueError(f"Mamba layer {layer} was not scored, so its heads cannot be chosen; add mamba to score.axes and score anew")
        energy_HP = np.ones((parent.mamba_num_heads, parent.mamba_head_dim)) if score_HP is None else score_HP**2
        channels[layer] = keep_best(energy_HP.sum(0), candidate.mamba_head_dim)
        heads[layer] = keep_heads(energy_HP[:, channels[layer]].sum(1), candidate.mamba_num_heads, parent.mamba_num_groups)
    hidden = keep_best(
        _of(None if scores is None else scores.hidden, parent.hidden_size, candidate.hidden_size, "embedding channels"),
        candidate.hidden_size,
    )
    return Selection(candidate.layers, hidden, neurons, heads, channels)


def keep_best(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the ``count`` highest scores, ascending; of equals the earlier.

    >>> keep_best(np.array([3.0, 1.0, 2.0, 3.0]), 2).tolist()
    [0, 3]
    """
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def keep_heads(scores_H: np.ndarray, count: int, num_groups: int) -> np.ndarray:
    """Return the indices of the best heads, ``count / num_groups`` of every group, ascending.

    >>> keep_heads(np.array([9.0, 8.0, 7.0, 1.0, 2.0, 3.0]), 2, 2).tolist()
    [0, 5]

    Raises:
        ValueError: the groups cannot keep the same number each.
    """
    if count % num_groups:
        raise ValueError(f"{count} heads are no multiple of the {num_groups} groups; every group keeps as many heads")
    by_group = np.split(scores_H, num_groups)
    first = np.cumsum([0] + [len(group) for group in by_group[:-1]])
    return np.concatenate([start + keep_best(group, count // num_groups) for start, group in zip(first, by_group, strict=True)])


def cut_tensor(key: str, tensor: Tensor, selection: Selection, parent: ModelConfig) -> Tensor:
    """Return the candidate's part of one of the parent's tensors, in memory of its own.

    Args:
        key: the parent's key, as checkpoints have it (``decoder.layers.3.mixer.in_proj.weight.x``).
        tensor: the parent's, whole.
        selection: what is kept; the tensor's layer is.
        parent: whose tensor it is.
    """
    for axis, kept in enumerate(_kept_along(key, selection, parent)):
        if kept is not None:
            tensor = tensor.index_select(axis, torch.from_numpy(kept))
    return tensor


def _kept_along(key: str, selection: Selection, parent: ModelConfig) -> list[np.ndarray | None]:
    """What is kept along each dimension of a tensor; None for all of it."""
    hidden = selection.hidden
    match = _LAYER.fullmatch(key)
    if match is None:
        return {
            "embedding.word_embeddings.weight": [None, hidden],
            "output_layer.weight": [None, hidden],
            "decoder.final_norm.weight": [hidden],
        }[key]
    layer, name = int(match[1]), match[2]
    if name.endswith("layer_norm_weight"):
        return [hidden]
    if name.startswith("mlp."):
        neurons = selection.neurons[layer]
        return {"mlp.linear_fc1.weight": [neurons, hidden], "mlp.linear_fc2.weight": [hidden, neurons]}[name]
    if name.startswith("self_attention."):
        return {"self_attention.linear_qkv.weight": [None, hidden], "self_attention.linear_proj.weight": [hidden, None]}[name]
    heads, channels = selection.heads[layer], selection.channels[layer]
    inner = (heads[:, None] * parent.mamba_head_dim + channels).reshape(-1)
    return {
        "mixer.in_proj.weight.z": [inner, hidden],
        "mixer.in_proj.weight.x": [inner, hidden],
        "mixer.in_proj.weight.B": [None, hidden],
        "mixer.in_proj.weight.C": [None, hidden],
        "mixer.in_proj.weight.dt": [heads, hidden],
        "mixer.conv1d.weight.x": [inner],
        "mixer.conv1d.weight.B": [None],
        "mixer.conv1d.weight.C": [None],
        "mixer.conv1d.bias.x": [inner],
        "mixer.conv1d.bias.B": [None],
        "mixer.conv1d.bias.C": [None],
        "mixer.A_log": [heads],
        "mixer.D": [heads],
        "mixer.dt_bias": [heads],
        "mixer.norm.weight": [inner],
        "mixer.out_proj.weight": [hidden, inner],
    }[name]


def _of(scores: np.ndarray | None, size: int, kept: int, what: str) -> np.ndarray:
    if scores is None:
        if kept < size:
            raise ValueError(f"{what} were not scored, so {kept} of {size} cannot be chosen; add the axis to score.axes and score anew")
        return np.zeros(size)
    return scores
