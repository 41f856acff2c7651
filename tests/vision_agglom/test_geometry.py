"""Windows lie on whole patches inside the canvas, hang on (step, sample, name) alone, and are cut where they say."""

from __future__ import annotations

import numpy as np
import torch

from vision_agglom.geometry import canvas_side, cut_window, draw_view

SAMPLES = np.arange(40)


def draw(name: str = "dino", step: int = 3, samples: np.ndarray = SAMPLES):
    return draw_view((4, 4), 32, canvas_side(32, 8, 2), samples, seed=1, step=step, name=name)


def test_windows_stay_inside_on_whole_patches() -> None:
    view = draw()
    for starts in (view.tops_B, view.lefts_B):
        assert set(starts.tolist()) == {0.0, 8.0, 16.0}


def test_a_window_hangs_on_its_address_alone() -> None:
    assert torch.equal(draw(samples=SAMPLES[7:9]).tops_B, draw().tops_B[7:9])
    assert not torch.equal(draw(name="clip").tops_B, draw().tops_B)
    assert not torch.equal(draw(step=4).tops_B, draw().tops_B)


def test_the_cut_is_where_the_view_says() -> None:
    rows = torch.arange(48.0).view(1, 1, 48, 1).expand(len(SAMPLES), 3, 48, 48)
    windows = cut_window(rows, draw())
    assert windows.shape == (len(SAMPLES), 3, 32, 32)
    assert torch.equal(windows[:, 0, 0, 0].double(), draw().tops_B)


def test_without_shifts_everyone_sees_the_canvas() -> None:
    images = torch.rand(2, 3, 32, 32)
    view = draw_view((4, 4), 32, 32, SAMPLES[:2], seed=1, step=0, name="dino")
    assert cut_window(images, view) is images
