"""What every library's adapter returns: a module, how to read it, and what it expects of its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vision_agglom.plain.vit import RGB

IMAGENET: tuple[RGB, RGB] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI_CLIP: tuple[RGB, RGB] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALVES: tuple[RGB, RGB] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""(mean, standard deviation) of RGB in [0, 1]."""

Described = tuple[Tensor | None, Tensor]
"""Summary [B, C] or None, and spatial features [B, rows x columns, C], row-major."""


@dataclass(frozen=True)
class Tower:
    """A vision model as its library built it, on the CPU, with what has to be known to run it."""

    module: nn.Module
    describe: Callable[[Tensor], Described]
    """From normalised images [B, 3, H, W] to summary and spatial features."""
    patch_size: int
    resolution: int
    """Side in pixels that it was made for; the teacher's is rounded down to whole patches, which are all that a ViT sees of it."""
    fixed_resolution: bool
    """Whether it takes no other side, or was trained at this one alone."""
    normalisation: tuple[RGB, RGB]
    can_change_sides: bool = True
    """Whether it runs at other sides at all."""


def split_tokens(tokens_BTC: Tensor, num_prefix: int) -> Described:
    """Return the first token and those after the prefix (class token and registers)."""
    return tokens_BTC[:, 0], tokens_BTC[:, num_prefix:]


def flatten_map(features_BCHW: Tensor) -> Tensor:
    """Return a feature map as row-major tokens [B, H x W, C]."""
    return features_BCHW.flatten(2).mT


def side_of(size: object) -> int:
    """Return the one number in a size that libraries write as a number, (side, side) or (channels, side, side).

    Raises:
        ValueError: the last two numbers differ.
    """
    if isinstance(size, int):
        return size
    *_, height, width = (int(number) for number in size)  # type: ignore[attr-defined]
    if height != width:
        raise ValueError(f"expected a square, got {height} x {width}")
    return height


def build_seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Return ``build()`` with weights drawn from ``seed``, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
