"""Teachers from open_clip: DFN and OpenAI CLIP, SigLIP, and whatever else has an image tower there."""

from __future__ import annotations

import math

import open_clip
import torch
from timm.layers.format import Format
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import interpolate

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
        return _describe_trunk(visual, normalisation, spec.sides == "any" or spec.resolution is not None)
    visual.output_tokens = True
    patch_size = side_of(visual.patch_size)

    def describe(pixels: Tensor) -> Described:
        grid = (pixels.shape[2] // patch_size, pixels.shape[3] // patch_size)
        positions_PD = resize_positions(visual.positional_embedding, grid, num_prefix=1)
        return functional_call(visual, {"positional_embedding": positions_PD}, (pixels,))

    return Tower(
        module=visual,
        describe=describe,
        patch_size=patch_size,
        resolution=side_of(visual.image_size),
        fixed_resolution=True,
        normalisation=normalisation,
    )


def resize_positions(positions_PD: Tensor, grid: tuple[int, int], num_prefix: int) -> Tensor:
    """A learned table of positions for another grid: bicubic with antialiasing, in fp32, as open_clip and timm resize what they load.

    Args:
        positions_PD: [prefix + side^2, D]; the prefix's rows stay as they are.
        grid: (rows, columns) wanted.

    Returns:
        [prefix + rows x columns, D] in the dtype given.
    """
    prefix_SD, table_TD = positions_PD.split([num_prefix, len(positions_PD) - num_prefix])
    side = math.isqrt(len(table_TD))
    if grid == (side, side):
        return positions_PD
    table_1DHW = table_TD.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
    resized_1DHW = interpolate(table_1DHW, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix_SD, resized_1DHW[0].flatten(1).mT.to(positions_PD.dtype)])


def _describe_trunk(visual: nn.Module, normalisation: tuple, any_side: bool) -> Tower:
    """A timm model with open_clip's projection behind it."""
    can_change_sides = isinstance(visual.trunk, VisionTransformer)
    if any_side and can_change_sides:
        _resize_positions_at_every_call(visual.trunk)
    trunk = describe_timm(visual.trunk, fixed_resolution=True)

    def describe(pixels: Tensor) -> Described:
        summary, spatial = trunk.describe(pixels)
        return visual.head(summary), spatial

    return Tower(visual, describe, trunk.patch_size, side_of(visual.image_size), True, normalisation, can_change_sides)


def _resize_positions_at_every_call(trunk: nn.Module) -> None:
    """Make of a built timm ViT what its argument dynamic_img_size would have made, which open_clip does not pass on."""
    trunk.dynamic_img_size = True
    trunk.patch_embed.strict_img_size = False
    trunk.patch_embed.flatten, trunk.patch_embed.output_fmt = False, Format.NHWC
