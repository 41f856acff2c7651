"""Procedural scenes with known labels: shapes on a textured ground, with the class of each pixel.

A scene is a function of (seed, index), so every host draws the same ones. Its class is the kind of its largest shape; the smaller shapes
around it are distractors that its mask names too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vision_agglom.images.randomness import sample_uniforms

_MAX_SHAPES = 4
_WAVES = 6
_Field = np.ndarray


def _regular(sides: int) -> Callable[[_Field, _Field], _Field]:
    """A regular polygon with its corners at distance 1."""

    def inside(x: _Field, y: _Field) -> _Field:
        wedge = 2 * np.pi / sides
        angle = (np.arctan2(y, x) % wedge) - wedge / 2
        return np.hypot(x, y) * np.cos(angle) < np.cos(np.pi / sides)

    return inside


SHAPES: dict[str, Callable[[_Field, _Field], _Field]] = {
    "disc": lambda x, y: np.hypot(x, y) < 0.85,
    "square": _regular(4),
    "triangle": _regular(3),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.65) < 0.22,
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) < 0.25) & (np.maximum(np.abs(x), np.abs(y)) < 0.95),
    "star": lambda x, y: np.hypot(x, y) < 0.55 + 0.35 * np.cos(5 * np.arctan2(y, x)),
    "bars": lambda x, y: (np.maximum(np.abs(x), np.abs(y)) < 0.9) & (np.cos(3.5 * np.pi * x) > 0),
}
"""Shape name -> whether points of its own frame, about [-1, 1] squared, lie inside. Class 0 is the ground, shape i is class i + 1."""

NUM_SCENE_CLASSES = len(SHAPES) + 1


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it."""

    image: np.ndarray
    """uint8 [side, side, 3]."""
    mask: np.ndarray
    """uint8 [side, side], the class of each pixel."""
    class_index: int
    """Class of the largest shape, from 1."""


def draw_scene(index: int, *, side: int, seed: int = 0) -> Scene:
    """Return scene ``index`` of ``side`` x ``side`` pixels; the same scene at every side, drawn finer."""
    draws = iter(sample_uniforms(16 + 8 * _WAVES + 16 * (_MAX_SHAPES + 1), "scene", seed, index))
    places = (np.arange(side) + 0.5) / side
    x, y = np.meshgrid(places, places)
    image = _texture(x, y, draws, contrast=0.25)
    mask = np.zeros((side, side), dtype=np.uint8)
    num_small = int(next(draws) * _MAX_SHAPES)
    # The main shape comes last, so that none hides it.
    for radius in [*(0.08 + 0.08 * next(draws) for _ in range(num_small)), 0.22 + 0.12 * next(draws)]:
        kind = int(next(draws) * len(SHAPES))
        main = radius >= 0.2
        margin = radius if main else 0.1
        across, down = (margin + (1 - 2 * margin) * next(draws) for _ in range(2))
        inside = _place(list(SHAPES.values())[kind], x, y, across, down, radius, 2 * np.pi * next(draws))
        colour = np.array([next(draws) for _ in range(3)])
        shade = 0.75 + 0.25 * (x * next(draws) + y * next(draws))
        image = np.where(inside[..., None], colour * shade[..., None], image)
        mask[inside] = kind + 1
    return Scene((image.clip(0, 1) * 255).round().astype(np.uint8), mask, int(kind) + 1)


def _texture(x: _Field, y: _Field, draws: Iterator[float], contrast: float) -> np.ndarray:
    """A base colour with a few waves of random direction and length in it."""
    base = np.array([0.2 + 0.6 * next(draws) for _ in range(3)])
    image = np.broadcast_to(base, (*x.shape, 3)).copy()
    for _ in range(_WAVES):
        direction, cycles, phase = 2 * np.pi * next(draws), 2 + 14 * next(draws), 2 * np.pi * next(draws)
        tint = np.array([next(draws) - 0.5 for _ in range(3)])
        wave = np.sin(2 * np.pi * cycles * (x * np.cos(direction) + y * np.sin(direction)) + phase)
        image += contrast * wave[..., None] * tint
    return image


def _place(
    shape: Callable[[_Field, _Field], _Field], x: _Field, y: _Field, across: float, down: float, radius: float, turn: float
) -> _Field:
    right, below = (x - across) / radius, (y - down) / radius
    return shape(right * np.cos(turn) + below * np.sin(turn), below * np.cos(turn) - right * np.sin(turn))
