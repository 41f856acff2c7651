"""Time of a decoding step as a sum over layers, from times that were measured on the device at hand, one layer kind at a time.

    step = fixed + attention x its time + mamba x its time + sum over MLP layers of (base + per_neuron x width)

The times of a layer kind hold for one hidden size and one shape of the Mamba heads; a grid over those is measured point by point.
Measuring is in ``timing.py``; here is the arithmetic, which imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.layout.pattern import ATTENTION, MAMBA, MLP
from tools.minipuzzle.scores import read_json, write_json


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of one decoding step, by what takes them."""

    hidden_size: int
    mamba_num_heads: int
    mamba_head_dim: int
    fixed: float
    """Embedding, final norm and output layer."""
    attention: float
    mamba: float
    mlp_base: float
    mlp_per_neuron: float

    def mlp(self, ffn_hidden_size: int) -> float:
        """An MLP layer of a width."""
        return self.mlp_base + self.mlp_per_neuron * ffn_hidden_size

    def layer(self, kind: str, ffn_hidden_size: int) -> float:
        """A layer of a kind and, where it is an MLP layer, a width."""
        return self.mlp(ffn_hidden_size) if kind == MLP else {ATTENTION: self.attention, MAMBA: self.mamba}[kind]


@dataclass(frozen=True)
class LatencyModel:
    """Times measured on one device, for one context length and batch."""

    device: str
    precision: str
    context_tokens: int
    batch_size: int
    times: tuple[LayerTimes, ...]
    made_from: dict[str, Any] = field(default_factory=dict)
    """How they were measured (``inputs.latency_inputs``)."""

    @property
    def digest(self) -> str:
        """A digest of the times, which an edit of one changes."""
        text = json.dumps([asdict(times) for times in self.times], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def of(self, hidden_size: int, mamba_num_heads: int, mamba_head_dim: int) -> LayerTimes:
        """Return the times at these widths.

        Raises:
            ValueError: they were not measured.
        """
        for times in self.times:
            if (times.hidden_size, times.mamba_num_heads, times.mamba_head_dim) == (hidden_size, mamba_num_heads, mamba_head_dim):
                return times
        raise ValueError(
            f"no times were measured at hidden_size={hidden_size}, mamba_num_heads={mamba_num_heads}, mamba_head_dim={mamba_head_dim}; "
            "remove latency.json and search again"
        )

    def covers(self, model: ModelConfig) -> bool:
        """Whether layers of its widths were measured."""
        own = (model.hidden_size, model.mamba_num_heads, model.mamba_head_dim)
        return any((times.hidden_size, times.mamba_num_heads, times.mamba_head_dim) == own for times in self.times)

    def predict(self, model: ModelConfig) -> float:
        """Return the milliseconds of a decoding step of a whole model.

        Raises:
            ValueError: its widths were not measured.
        """
        times = self.of(model.hidden_size, model.mamba_num_heads, model.mamba_head_dim)
        ffn = iter(model.ffn_hidden_sizes)
        return times.fixed + sum(times.layer(kind, next(ffn) if kind == MLP else 0) for kind in model.layer_kinds)


def fit_line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Return base and slope of the line nearest to (width, ms) points, both at least 0; of one point alone a line through 0.

    >>> fit_line([(10, 3.0), (20, 5.0)])
    (1.0, 0.2)
    """
    mean_x, mean_y = (sum(point[axis] for point in points) / len(points) for axis in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else mean_y / mean_x
    slope = min(max(slope, 0.0), mean_y / mean_x)
    return mean_y - slope * mean_x, slope


def save_latency(model: LatencyModel, file: Path) -> None:
    """Write the times where the next search finds them."""
    write_json(file, asdict(model))


def load_latency(file: Path) -> LatencyModel:
    """Read times that were measured before.

    Raises:
        ValueError: the file is damaged.
    """
    content = read_json(file, "search measures anew without it")
    try:
        return LatencyModel(**content | {"times": tuple(LayerTimes(**times) for times in content["times"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{file} holds no layer times ({error}); remove it and search again") from None
