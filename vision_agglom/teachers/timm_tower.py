"""Teachers from timm: every ViT whose forward_features gives tokens or a map, such as CLIP, SigLIP, DINOv2, DINOv3 and SAM."""

from __future__ import annotations

import timm
from torch import Tensor, nn

from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.teachers.tower import Described, Tower, build_seeded, flatten_map, side_of


def build_tower(spec: TeacherConfig) -> Tower:
    """Build ``timm.create_model(spec.model)`` without its classifier; ``spec.options`` are further arguments.

    Sides other than its own need the option dynamic_img_size, which sides=any sets for models that take it.

    Raises:
        RuntimeError: timm knows no such model, or has no weights of it.
    """
    options = {"num_classes": 0, **spec.options}
    if spec.sides == "any":
        options.setdefault("dynamic_img_size", True)
    model = build_seeded(spec.seed, lambda: timm.create_model(spec.model, pretrained=spec.pretrained, **options))
    return describe_timm(model, fixed_resolution=not options.get("dynamic_img_size", _takes_any_side(model)))


def describe_timm(model: nn.Module, fixed_resolution: bool) -> Tower:
    """Return how to read a timm model.

    Summary: what its pooling gives before the classifier (class token, attention pool, mean). SAM: the last block's map, before the neck.
    """
    config = model.pretrained_cfg
    is_sam = hasattr(model, "neck")
    if is_sam:
        model.neck = nn.Identity()

    def describe(pixels: Tensor) -> Described:
        features = model.forward_features(pixels)
        if is_sam:
            return None, flatten_map(features)
        summary = model.forward_head(features, pre_logits=True)
        return summary, flatten_map(features) if features.ndim == 4 else features[:, model.num_prefix_tokens :]

    patch_size = side_of(model.patch_embed.patch_size)
    resolution = side_of(getattr(model.patch_embed, "img_size", None) or config["input_size"])
    if resolution % patch_size:
        # Of 384 pixels and patches of 14 it sees 378: what is left over need not be there.
        model.patch_embed.strict_img_size = False
    return Tower(
        module=model,
        describe=describe,
        patch_size=patch_size,
        resolution=resolution,
        fixed_resolution=fixed_resolution or is_sam,
        normalisation=(tuple(config["mean"]), tuple(config["std"])),
        can_change_sides=not is_sam,
    )


def _takes_any_side(model: nn.Module) -> bool:
    return not getattr(model.patch_embed, "strict_img_size", True)
