"""What scoring finds out about a parent: how much each layer, neuron, head and channel matters; and the two files it is kept in.

``scores.json`` holds the layers and whose scores they are, for people to read and edit; ``scores.safetensors`` beside it the long vectors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.layout.pattern import ATTENTION, KIND_NAMES, MAMBA, MLP

SYNTHETIC = "synthetic"
"""Stands for a checkpoint where scores were made up."""


@dataclass(frozen=True)
class Scores:
    """Importance, higher is more. Arrays are float64."""

    checkpoint: str
    """Digest of the weights that were scored (``checkpoint_digest``), or ``SYNTHETIC``."""
    model: dict[str, Any]
    """The parent's architecture."""
    layer_mse: np.ndarray
    """[layers] mean squared change of the last hidden state (final norm included) without the layer."""
    layer_rank: np.ndarray
    """[layers] place of the layer among all, 0 the least important, averaged over samples: what layers are kept by."""
    neurons: dict[int, np.ndarray] = field(default_factory=dict)
    """MLP layer -> [ffn_hidden_size]: mean absolute activation over the sequence, L2 over samples."""
    mamba: dict[int, np.ndarray] = field(default_factory=dict)
    """Mamba layer -> [heads, head_dim]: the same of the x part of in_proj's output."""
    hidden: np.ndarray | None = None
    """[hidden_size]: the same of every norm's output, summed over the layers."""
    made_from: dict[str, Any] = field(default_factory=dict)
    """How they were made (``inputs.scoring_inputs``)."""

    @property
    def kinds(self) -> str:
        """The parent's layers, one character each."""
        return self.model["pattern"]

    @property
    def digest(self) -> str:
        """A digest of the scores, which an edit of one changes."""
        return arrays_digest({"layer_mse": self.layer_mse, "layer_rank": self.layer_rank, **self.vectors()})

    def vectors(self) -> dict[str, np.ndarray]:
        """The long ones, by the names that they have in ``scores.safetensors``."""
        vectors = {f"neurons.{layer}": values for layer, values in self.neurons.items()}
        vectors |= {f"mamba.{layer}": values for layer, values in self.mamba.items()}
        return vectors if self.hidden is None else vectors | {"hidden": self.hidden}


def save_scores(scores: Scores, file: Path) -> None:
    """Write ``file`` and the vectors beside it."""
    from safetensors.numpy import save_file

    layers = [
        {"layer": number, "kind": KIND_NAMES[kind], "mse": float(mse), "mean_rank": float(rank)}
        for number, (kind, mse, rank) in enumerate(zip(scores.kinds, scores.layer_mse, scores.layer_rank, strict=True))
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(values, dtype=np.float64) for name, values in scores.vectors().items()}, vectors_path(file))
    write_json(file, {"checkpoint": scores.checkpoint, "made_from": scores.made_from, "model": scores.model, "layers": layers})


def load_scores(file: Path) -> Scores:
    """Read scores back, edited or not.

    Raises:
        ValueError: a file is missing or damaged, a score is no finite number, or a vector does not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    content = read_json(file, "run the score stage first")
    try:
        vectors = load_file(vectors_path(file))
        layers = _in_model_order(content["layers"], content["model"]["pattern"])
        scores = Scores(
            checkpoint=content["checkpoint"],
            model=content["model"],
            layer_mse=np.array([layer["mse"] for layer in layers], dtype=np.float64),
            layer_rank=np.array([layer["mean_rank"] for layer in layers], dtype=np.float64),
            neurons={int(name[8:]): values for name, values in vectors.items() if name.startswith("neurons.")},
            mamba={int(name[6:]): values for name, values in vectors.items() if name.startswith("mamba.")},
            hidden=vectors.get("hidden"),
            made_from=content["made_from"],
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} and {vectors_path(file).name} are no scores ({type(error).__name__}: {error}); score anew") from error
    check_scores(scores, str(file))
    return scores


def _in_model_order(layers: list[dict[str, Any]], kinds: str) -> list[dict[str, Any]]:
    """The layers by their numbers, in whatever order a person left them."""
    ordered = sorted(layers, key=lambda layer: layer["layer"])
    named = [(layer["layer"], layer["kind"]) for layer in ordered]
    expected = [(number, KIND_NAMES[kind]) for number, kind in enumerate(kinds)]
    if named != expected:
        wrong = sorted(set(named) ^ set(expected))
        raise ValueError(f"layers must name each of the model's {len(kinds)} layers once, with its kind; look at {wrong or named}")
    return ordered


def check_scores(scores: Scores, source: str) -> None:
    """Refuse scores that say nothing or do not fit their model.

    Raises:
        ValueError: a score is NaN or infinite, or an array has another shape than the model's.
    """
    model = ModelConfig.model_validate(scores.model)
    shapes: dict[str, tuple[np.ndarray, tuple[int, ...]]] = {
        "layer mse": (scores.layer_mse, (model.num_layers,)),
        "layer mean_rank": (scores.layer_rank, (model.num_layers,)),
        **{f"neurons of layer {layer}": (values, (model.ffn_hidden_size,)) for layer, values in scores.neurons.items()},
        **{f"heads of layer {layer}": (values, (model.mamba_num_heads, model.mamba_head_dim)) for layer, values in scores.mamba.items()},
    }
    if scores.hidden is not None:
        shapes["embedding channels"] = (scores.hidden, (model.hidden_size,))
    for name, (values, expected) in shapes.items():
        if values.shape != expected:
            raise ValueError(f"{source}: scores of {name} are {list(values.shape)}, the model asks for {list(expected)}; score anew")
        if not np.isfinite(values).all():
            where = np.argwhere(~np.isfinite(values))[0].tolist()
            raise ValueError(
                f"{source}: the score of {name} at {where} is {values[tuple(where)]}; the parent's activations are not finite, or the "
                "file was edited: score anew from a sound checkpoint"
            )


def require_same_checkpoint(scores: Scores, checkpoint: str, source: Path) -> None:
    """Refuse scores of other weights than those that are about to be pruned.

    Raises:
        ValueError: the digests differ.
    """
    if scores.checkpoint != checkpoint:
        raise ValueError(
            f"{source} scores another checkpoint: it names weights {scores.checkpoint}, the parent's are {checkpoint}; score this one, "
            "or name the parent that was scored"
        )


def checkpoint_digest(tensors: dict[str, str]) -> str:
    """Return a digest of weights from the digests of their tensors (a checkpoint's manifest), whatever layout wrote them."""
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(tensors.items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return a digest of named arrays, in whatever order they come."""
    digest = hashlib.blake2b(digest_size=8)
    for name, values in sorted(arrays.items()):
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def mean_ranks(mse_SL: np.ndarray) -> np.ndarray:
    """Return each layer's place among all, 0 the least important, averaged over samples: [samples, layers] -> [layers]."""
    return np.argsort(np.argsort(mse_SL, axis=1, kind="stable"), axis=1, kind="stable").mean(axis=0)


def synthetic_scores(model: ModelConfig, seed: int) -> Scores:
    """Return made-up scores with the paper's outline: the ends matter most, and a few neurons much more than the rest."""
    generator = np.random.default_rng(seed)
    place = np.linspace(-1.0, 1.0, model.num_layers)
    mse = (0.02 + np.abs(place) ** 6) * generator.lognormal(0.0, 0.5, model.num_layers)
    of_kind = {kind: [layer for layer, its in enumerate(model.layer_kinds) if its == kind] for kind in (MAMBA, ATTENTION, MLP)}
    return Scores(
        checkpoint=SYNTHETIC,
        model=model.architecture(),
        layer_mse=mse,
        layer_rank=mean_ranks(mse[None]),
        neurons={layer: generator.lognormal(0.0, 1.0, model.ffn_hidden_size) for layer in of_kind[MLP]},
        mamba={layer: generator.lognormal(0.0, 0.5, (model.mamba_num_heads, model.mamba_head_dim)) for layer in of_kind[MAMBA]},
        hidden=generator.lognormal(0.0, 0.5, model.hidden_size),
    )


def vectors_path(file: Path) -> Path:
    """Where the long vectors beside ``scores.json`` are."""
    return file.with_suffix(".safetensors")


def read_json(file: Path, advice: str) -> dict[str, Any]:
    """Return a stage's file.

    Raises:
        ValueError: it is missing (the message gives ``advice``), or no JSON with a mapping.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("expected a mapping")
        return content
    except FileNotFoundError:
        raise ValueError(f"{file} is not there; {advice}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); {advice}") from error


def write_json(file: Path, content: Any) -> None:
    """Write a stage's file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
