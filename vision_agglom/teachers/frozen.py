"""A tower made a teacher: frozen, fed with what it expects, in slices that fit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.contract import TeacherFacts, TeacherFeatures
from vision_agglom.teachers.tower import Tower


class FrozenTeacher:
    """Runs a tower on images in [0, 1] (see ``contract.Teacher``).

    A side that a tower was made for and its patch does not divide is rounded down: 384 with patches of 14 are 378, since the patch
    embedding drops the rest. One that the configuration gives has to be a multiple of the patch.

    Args:
        tower: as its library built it.
        dtype: fp32 or bf16, of weights, activations and features.

    Raises:
        ValueError: the configuration asks for sides that the tower cannot take.
    """

    def __init__(self, tower: Tower, config: TeacherConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        own_side = tower.resolution // tower.patch_size * tower.patch_size
        resolution = config.resolution or own_side
        if not tower.can_change_sides and (config.sides == "any" or resolution != own_side):
            raise ValueError(
                f"teacher {config.name!r} runs at {own_side} pixels only; drop sides={config.sides} and resolution={resolution}, "
                "or set resize_input=true"
            )
        self.tower = tower
        tower.module.eval().requires_grad_(False).to(device=device, dtype=dtype)
        mean, std = (config.mean, config.std) if config.mean is not None and config.std is not None else tower.normalisation
        self.mean_C = torch.tensor(mean, device=device)
        """Mean of the input normalisation: the colour that becomes zero."""
        self._std_C = torch.tensor(std, device=device)
        self._config = config
        self._dtype = dtype
        fixed = tower.fixed_resolution if config.sides == "own" else config.sides == "fixed"
        self.facts = TeacherFacts(config.name, tower.patch_size, resolution, fixed, None, 0)
        self.facts = self._with_channels(self.facts)

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> TeacherFeatures:
        """Describe images of ``facts.resolution``, or of any multiple of the patch where the resolution is not fixed.

        Raises:
            ValueError: the images have a side that the teacher does not take.
        """
        if self._config.resize_input and images_BCHW.shape[2:] != (self.facts.resolution,) * 2:
            images_BCHW = interpolate(images_BCHW, size=(self.facts.resolution,) * 2, mode="bilinear", antialias=True)
        self._check_sides(images_BCHW)
        height, width = images_BCHW.shape[2:]
        parts = [self._describe(part) for part in images_BCHW.split(self._config.slice_size or max(len(images_BCHW), 1))]
        summaries = [summary for summary, _ in parts if summary is not None]
        return TeacherFeatures(
            summary_BC=torch.cat(summaries) if summaries else None,
            spatial_BTC=torch.cat([spatial for _, spatial in parts]),
            grid=(height // self.facts.patch_size, width // self.facts.patch_size),
        )

    def _describe(self, images_BCHW: Tensor) -> tuple[Tensor | None, Tensor]:
        normalised = (images_BCHW.float() - self.mean_C.view(-1, 1, 1)) / self._std_C.view(-1, 1, 1)
        summary, spatial = self.tower.describe(normalised.to(self._dtype))
        if self._config.summary == "none":
            summary = None
        if self._config.output_scale != 1.0:
            spatial = spatial * self._config.output_scale
            summary = None if summary is None else summary * self._config.output_scale
        return summary, spatial

    def _check_sides(self, images_BCHW: Tensor) -> None:
        name, side, patch = self.facts.name, self.facts.resolution, self.facts.patch_size
        height, width = images_BCHW.shape[2:]
        if self.facts.fixed_resolution and (height, width) != (side, side):
            raise ValueError(
                f"teacher {name!r} takes images of {side} x {side} pixels, got {height} x {width}; set its resize_input=true, lay the "
                "images out as a mosaic, or set its sides=any where the model can"
            )
        if height % patch or width % patch:
            raise ValueError(
                f"teacher {name!r} cuts images into patches of {patch} pixels, which {height} x {width} does not divide into; choose "
                f"multiples of {patch}, or set its resize_input=true"
            )

    @torch.no_grad()
    def _with_channels(self, facts: TeacherFacts) -> TeacherFacts:
        """Run the tower once, so that what it cannot do is said before anything else begins."""
        side, patch = facts.resolution, facts.patch_size
        if side % patch:
            below, above = side // patch * patch, -(-side // patch) * patch
            choice = f"{below} or {above}" if below else f"{above}"
            raise ValueError(f"teacher {facts.name!r}: resolution={side} is no multiple of its patch of {patch} pixels; write {choice}")
        try:
            summary, spatial = self._describe(torch.zeros(1, 3, side, side, device=self.mean_C.device))
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"teacher {facts.name!r} fails on an image of {side} x {side} pixels: {error}") from error
        num_tokens = (side // patch) ** 2
        assert spatial.ndim == 3 and spatial.shape[1] == num_tokens, f"{facts.name}: {tuple(spatial.shape)} for {num_tokens} patches"
        summary_channels = None if summary is None else summary.shape[1]
        return TeacherFacts(facts.name, facts.patch_size, side, facts.fixed_resolution, summary_channels, spatial.shape[2])
