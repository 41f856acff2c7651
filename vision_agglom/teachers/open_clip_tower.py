"""Teachers from open_clip: DFN and OpenAI CLIP, SigLIP, and whatever else has an image tower there."""

from __future__ import annotations

import open_clip
from torch import Tensor, nn

from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.teachers.timm_tower import describe_timm
from vision_agglom.teachers.tower import Described, Tower, build_seeded, side_of


def build_tower(spec: TeacherConfig) -> Tower:
    """Build the image tower of ``open_clip.create_model(spec.model, pretrained=spec.weights)``; ``spec.options`` change its vision_cfg.

    Summary: the projected embedding. Spatial: patch tokens after the final norm, before the projection.

    Raises:
        ValueError: open_clip knows no such model.
        RuntimeError: it has no such weights.
    """
    known = open_clip.get_model_config(spec.model)
    if known is None:
        raise ValueError("open_clip has no configuration of this name")
    changes = {"vision_cfg": known["vision_cfg"] | spec.options} if spec.options else {}
    model = build_seeded(
        spec.seed,
        lambda: open_clip.create_model(
            spec.model, pretrained=spec.weights, require_pretrained=spec.pretrained, pretrained_text=False, **changes
        ),
    )
    visual = model.visual
    normalisation = (tuple(visual.image_mean or open_clip.OPENAI_DATASET_MEAN), tuple(visual.image_std or open_clip.OPENAI_DATASET_STD))
    if hasattr(visual, "trunk"):
        return _describe_trunk(visual, normalisation)
    visual.output_tokens = True
    return Tower(
        module=visual,
        describe=visual,
        patch_size=side_of(visual.patch_size),
        resolution=side_of(visual.image_size),
        fixed_resolution=True,
        normalisation=normalisation,
        can_change_sides=False,
    )


def _describe_trunk(visual: nn.Module, normalisation: tuple) -> Tower:
    """A timm model with open_clip's projection behind it."""
    trunk = describe_timm(visual.trunk, fixed_resolution=True)

    def describe(pixels: Tensor) -> Described:
        summary, spatial = trunk.describe(pixels)
        return visual.head(summary), spatial

    return Tower(visual, describe, trunk.patch_size, side_of(visual.image_size), True, normalisation, can_change_sides=False)
