"""Windows of a canvas: what the student and each teacher are shown of an image.

With shifts, the canvas has a margin of ``shift_patches`` student patches, and everyone gets a window of the student's resolution at an
offset of its own: whole patches of its own grid, drawn for (step, sample, name). Without, everyone sees the canvas.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vision_agglom.randomness import generator_for
from vision_agglom.tokens import View


def canvas_side(resolution: int, patch_size: int, shift_patches: int) -> int:
    """Side in pixels of the images to read for a student of ``resolution``."""
    return resolution + shift_patches * patch_size


def draw_view(grid: tuple[int, int], resolution: int, canvas: int, samples: np.ndarray, *, seed: int, step: int, name: str) -> View:
    """A window of ``resolution`` pixels into each canvas for a network with this grid."""
    margin = canvas - resolution
    if margin == 0:
        return View.whole(grid, resolution, len(samples))
    offsets_B2 = torch.tensor([_draw_offset(grid, resolution, margin, seed, step, int(sample), name) for sample in samples])
    return View(grid, offsets_B2[:, 0].double(), offsets_B2[:, 1].double(), resolution)


def cut_window(canvases_BCHW: Tensor, view: View) -> Tensor:
    """The pixels of each image's window."""
    side = int(view.side)
    if canvases_BCHW.shape[2] == side:
        return canvases_BCHW
    places = zip(canvases_BCHW, view.tops_B.long().tolist(), view.lefts_B.long().tolist(), strict=True)
    return torch.stack([image_CHW[:, top : top + side, left : left + side] for image_CHW, top, left in places])


def _draw_offset(grid: tuple[int, int], resolution: int, margin: int, seed: int, step: int, sample: int, name: str) -> tuple[int, int]:
    generator = generator_for(seed, f"shift of {name}", step, sample)
    # Whole patches, to the nearest pixel where a patch is no whole number of canvas pixels.
    return tuple(round(int(generator.integers(int(margin / (resolution / count)) + 1)) * resolution / count) for count in grid)
