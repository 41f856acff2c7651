"""Small teachers of every kind that builds on a host without torchvision."""

from __future__ import annotations

from typing import Any

from vision_agglom.config.teachers import TeacherConfig

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MLP = {"intermediate_size": 64}
SIDE = {"image_size": 64, "patch_size": 16}

TWINS: dict[str, dict[str, Any]] = {
    "clip": {"library": "transformers", "options": SMALL | MLP | SIDE | {"projection_dim": 24}},
    "siglip": {"library": "transformers", "options": SMALL | MLP | SIDE},
    "siglip2": {"library": "transformers", "options": SMALL | MLP | {"patch_size": 16, "num_patches": 16}, "resolution": 64},
    "dinov2": {"library": "transformers", "options": SMALL | {"image_size": 56, "patch_size": 14}},
    "dinov2_with_registers": {"library": "transformers", "options": SMALL | SIDE | {"num_register_tokens": 4}},
    "dinov3_vit": {"library": "transformers", "options": SMALL | MLP | SIDE | {"num_register_tokens": 4}},
    "sam": {
        "library": "transformers",
        "options": SMALL | SIDE | {"mlp_dim": 64, "output_channels": 16, "window_size": 2, "global_attn_indexes": [1]},
    },
    "sam3": {
        "library": "transformers",
        "options": SMALL | MLP | SIDE | {"window_size": 2, "global_attn_indexes": [1], "pretrain_image_size": 32},
    },
    "radio": {"library": "transformers", "options": SMALL | {"patch_size": 16, "max_img_size": 128}, "resolution": 64},
    "vit": {
        "library": "checkpoint",
        "options": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "table_side": 8, "num_cls_tokens": 2, "summary_idxs": [0, 1]},
        "resolution": 64,
    },
}
"""Kind -> configuration of a twin, without its name."""


def twin(kind: str, **changes: Any) -> TeacherConfig:
    """The configuration of one of the twins above, with changes."""
    return TeacherConfig.model_validate({"name": "t", "model": kind, "pretrained": False, **TWINS[kind], **changes})
