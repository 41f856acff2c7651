"""Teachers from Hugging Face transformers: CLIP, SigLIP, SigLIP2, DINOv2, DINOv3, SAM, SAM3 and RADIO.

None of these needs torchvision: images come as tensors, and the normalisation is read from preprocessor_config.json as plain JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.image_processing_base import ImageProcessingMixin

from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.teachers.tower import (
    HALVES,
    IMAGENET,
    OPENAI_CLIP,
    RGB,
    Described,
    Tower,
    build_seeded,
    side_of,
    split_tokens,
)

Reader = Callable[[nn.Module, bool], Callable[[Tensor], Described]]
"""From a model, and whether other sides than its own are asked for, to the function that describes images."""


def _read_clip(model: nn.Module, any_side: bool) -> Callable[[Tensor], Described]:
    """Projected class token; patch tokens after the final norm, as open_clip returns them."""

    def describe(pixels: Tensor) -> Described:
        vision = model.vision_model
        tokens = vision(pixel_values=pixels, interpolate_pos_encoding=any_side)
        return model.visual_projection(tokens.pooler_output), vision.post_layernorm(tokens.last_hidden_state[:, 1:])

    return describe


def _read_siglip(model: nn.Module, any_side: bool) -> Callable[[Tensor], Described]:
    """Output of the attention pool, and the tokens it pools."""

    def describe(pixels: Tensor) -> Described:
        output = model(pixel_values=pixels, interpolate_pos_encoding=any_side)
        return output.pooler_output, output.last_hidden_state

    return describe


def _read_siglip2(model: nn.Module, any_side: bool) -> Callable[[Tensor], Described]:
    """As SigLIP; the model takes patches, channels last, and the size of their grid."""
    patch = model.config.patch_size

    def describe(pixels: Tensor) -> Described:
        batch, channels, height, width = pixels.shape
        rows, columns = height // patch, width // patch
        patches = pixels.view(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
        shapes = torch.tensor([[rows, columns]] * batch, device=pixels.device)
        output = model(
            pixel_values=patches.reshape(batch, rows * columns, -1),
            pixel_attention_mask=torch.ones(batch, rows * columns, dtype=torch.long, device=pixels.device),
            spatial_shapes=shapes,
        )
        return output.pooler_output, output.last_hidden_state

    return describe


def _read_dino(model: nn.Module, any_side: bool) -> Callable[[Tensor], Described]:
    """Class token and patch tokens after the final norm; registers are passed over."""
    num_prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    return lambda pixels: split_tokens(model(pixel_values=pixels).last_hidden_state, num_prefix)


def _read_sam(model: nn.Module, any_side: bool) -> Callable[[Tensor], Described]:
    """The last block's map, before the neck; no summary."""
    model.vision_encoder.neck = nn.Identity()
    return lambda pixels: (None, model(pixel_values=pixels).last_hidden_state.flatten(1, 2))


def _read_sam3(model: nn.Module, any_side: bool) -> Callable[[Tensor], Described]:
    """The trunk's tokens, before the neck, and their mean."""

    def describe(pixels: Tensor) -> Described:
        spatial = model(pixel_values=pixels).last_hidden_state
        return spatial.mean(1), spatial

    return describe


def _read_radio(model: nn.Module, any_side: bool) -> Callable[[Tensor], Described]:
    """RADIO's own two outputs, of images that are normalised outside, in fp32."""
    model.make_preprocessor_external()

    def describe(pixels: Tensor) -> Described:
        output = model(pixel_values=pixels)
        return output.summary, output.features

    return describe


@dataclass(frozen=True)
class _Kind:
    """How transformers names one kind of model, and how it is read."""

    config: str
    model: str
    read: Reader
    normalisation: tuple[RGB, RGB]
    fixed: bool
    can_change_sides: bool = True


_KINDS = {
    "clip": _Kind("CLIPVisionConfig", "CLIPVisionModelWithProjection", _read_clip, OPENAI_CLIP, fixed=True),
    "siglip": _Kind("SiglipVisionConfig", "SiglipVisionModel", _read_siglip, HALVES, fixed=True),
    "siglip2": _Kind("Siglip2VisionConfig", "Siglip2VisionModel", _read_siglip2, HALVES, fixed=False),
    "dinov2": _Kind("Dinov2Config", "Dinov2Model", _read_dino, IMAGENET, fixed=False),
    "dinov2_with_registers": _Kind("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", _read_dino, IMAGENET, fixed=False),
    "dinov3_vit": _Kind("DINOv3ViTConfig", "DINOv3ViTModel", _read_dino, IMAGENET, fixed=False),
    "sam": _Kind("SamVisionConfig", "SamVisionModel", _read_sam, IMAGENET, fixed=True, can_change_sides=False),
    "sam3": _Kind("Sam3ViTConfig", "Sam3ViTModel", _read_sam3, HALVES, fixed=True, can_change_sides=False),
    "radio": _Kind("RadioConfig", "RadioModel", _read_radio, OPENAI_CLIP, fixed=False),
}
_SUFFIXES = ("_vision_model", "_vit_model")
_DEFAULT_SIDES = {"siglip2": 384, "radio": 768}
"""Sides that a configuration does not hold: NaFlex models have none, and RadioConfig.image_size is not read by its model."""


def build_tower(spec: TeacherConfig) -> Tower:
    """Build a model from its hub name or folder, or a twin of the kind that ``spec.model`` names.

    Raises:
        ValueError: the kind is not one of those above.
        OSError: the hub or the folder has no such model.
    """
    if spec.pretrained:
        kind, kind_name = _find_kind(
            transformers.PretrainedConfig.get_config_dict(spec.model, revision=spec.revision)[0].get("model_type", "none")
        )
        model = _load_pretrained(kind, kind_name, spec)
        normalisation = _read_normalisation(spec)
    else:
        kind, kind_name = _find_kind(spec.model)
        config = _make_config(kind, spec.options)
        model = build_seeded(spec.seed, lambda: getattr(transformers, kind.model)(config))
        normalisation = None
    if kind_name == "radio":
        normalisation = tuple(model.config.norm_mean), tuple(model.config.norm_std)
    resolution = _DEFAULT_SIDES.get(kind_name) or side_of(model.config.image_size)
    patch_size = side_of(model.config.patch_size)
    # A side of broken patches is run as whole ones, which the model counts as another side.
    any_side = spec.sides == "any" or spec.resolution not in (None, resolution) or resolution % patch_size > 0
    return Tower(
        module=model,
        describe=kind.read(model, any_side),
        patch_size=patch_size,
        resolution=resolution,
        fixed_resolution=kind.fixed,
        normalisation=normalisation or kind.normalisation,
        can_change_sides=kind.can_change_sides,
    )


def _find_kind(model_type: str) -> tuple[_Kind, str]:
    name = next((model_type.removesuffix(suffix) for suffix in _SUFFIXES if model_type.endswith(suffix)), model_type)
    if name not in _KINDS:
        raise ValueError(f"no teacher is of the kind {model_type!r}; expected one of {', '.join(_KINDS)}")
    return _KINDS[name], name


def _make_config(kind: _Kind, options: dict[str, Any]) -> transformers.PretrainedConfig:
    config_class = getattr(transformers, kind.config)
    if "initializer_range" in config_class().to_dict():
        # SAM's own default of 1e-10 would make a twin that says nothing.
        options = {"initializer_range": 0.02, **options}
    known = config_class().to_dict()
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{kind.config} has no {', '.join(unknown)}")
    return config_class(**options)


def _load_pretrained(kind: _Kind, kind_name: str, spec: TeacherConfig) -> nn.Module:
    if kind_name == "sam3":
        return transformers.AutoModel.from_pretrained(spec.model, revision=spec.revision, **spec.options).vision_encoder.backbone
    return getattr(transformers, kind.model).from_pretrained(spec.model, revision=spec.revision, **spec.options)


def _read_normalisation(spec: TeacherConfig) -> tuple[RGB, RGB] | None:
    """Return mean and standard deviation from the model's preprocessor_config.json, None where it has none."""
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(spec.model, revision=spec.revision)
    except OSError:
        return None
    mean, std = processor.get("image_mean"), processor.get("image_std")
    return (tuple(mean), tuple(std)) if mean and std else None
