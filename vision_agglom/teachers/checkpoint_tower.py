"""Teachers from a plain checkpoint: a file in the names of NVlabs' RADIO releases (and of our exports), or of a timm ViT."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.plain.files import BACKBONE, FEATURE_NORMALIZER, GENERATOR, VitFile, is_behind_backbone, read_vit_file
from vision_agglom.plain.vit import RGB, PlainViT, PlainViTShape
from vision_agglom.teachers.tower import IMAGENET, Tower, build_seeded

_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16, "so400m": 16, "giant": 16}
"""Attention heads by the size in timm's model names, which no tensor's shape tells."""


def build_tower(spec: TeacherConfig) -> Tower:
    """Load the file ``spec.model``, or build a twin whose shape ``spec.options`` gives (fields of PlainViTShape).

    ``spec.options`` may name num_heads, which a checkpoint holds only by its model's name, and mean and std of a timm file.

    Raises:
        ValueError: the file is no such checkpoint, does not say how many heads it has, or maps its features once more.
        OSError: there is no such file.
    """
    if not spec.pretrained:
        shape = PlainViTShape(**_as_tuples(spec.options))
        return _tower(build_seeded(spec.seed, lambda: PlainViT(shape)), fixed_resolution=False)
    file = read_vit_file(spec.model)
    state = {name: tensor for name, tensor in file.state.items() if not is_behind_backbone(name)}
    if any(name.startswith(FEATURE_NORMALIZER) for name in state):
        raise ValueError(
            f"the file maps its features once more ({FEATURE_NORMALIZER}...), which this reader does not; take another teacher"
        )
    if file.is_timm:
        if not file.num_cls_tokens:
            raise ValueError("expected a timm ViT with a class token")
        state |= {f"input_conditioner.norm_{kind}": torch.tensor(rgb).view(3, 1, 1) for kind, rgb in zip(("mean", "std"), IMAGENET)}
    model = PlainViT(_find_shape(state, file, spec.options))
    model.load_state_dict(state)
    return _tower(model, fixed_resolution=file.is_timm)


def find_num_heads(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Return the number of attention heads that options, the arguments' model_kwargs or the model's name say.

    Raises:
        ValueError: none of them does.
    """
    known = options.get("num_heads") or (getattr(args, "model_kwargs", None) or {}).get("num_heads")
    if known:
        return int(known)
    name = str(getattr(args, "model", ""))
    for size, num_heads in _HEADS.items():
        if f"vit_{size}_" in name:
            return num_heads
    raise ValueError(f"the checkpoint's model {name!r} does not tell its number of attention heads; give options.num_heads")


def _tower(model: PlainViT, fixed_resolution: bool) -> Tower:
    side = model.shape.table_side * model.shape.patch_size
    return Tower(
        module=model,
        describe=model.describe,
        patch_size=model.shape.patch_size,
        # A table is made for the largest side; RADIO is usually run at no more than 48 patches.
        resolution=side if fixed_resolution else min(side, 48 * model.shape.patch_size),
        fixed_resolution=fixed_resolution,
        normalisation=(_rgb(model.input_conditioner.norm_mean), _rgb(model.input_conditioner.norm_std)),
    )


def _rgb(values: Tensor) -> RGB:
    red, green, blue = values.flatten().tolist()
    return red, green, blue


def _find_shape(state: dict[str, Tensor], file: VitFile, options: dict[str, Any]) -> PlainViTShape:
    embedder = state[f"{GENERATOR}embedder.weight"]
    blocks = {name.split(".")[2] for name in state if name.startswith(f"{BACKBONE}blocks.")}
    teachers = getattr(file.args, "teachers", None) or [{"name": "own"}]
    names = list(dict.fromkeys(teacher["name"] for teacher in teachers))
    used = {teacher["name"] for teacher in teachers if teacher.get("use_summary", True)}
    first_places = [[teacher["name"] for teacher in teachers].index(name) for name in names if name in used]
    num_prefix = len(state[f"{GENERATOR}cls_token.token"])
    num_cls_tokens = file.num_cls_tokens or 1
    return PlainViTShape(
        hidden_size=len(embedder),
        num_layers=len(blocks),
        num_heads=find_num_heads(file.args, options),
        patch_size=math.isqrt(embedder.shape[1] // 3),
        mlp_hidden_size=len(state[f"{BACKBONE}blocks.0.mlp.fc1.weight"]),
        num_cls_tokens=num_cls_tokens,
        num_registers=num_prefix - num_cls_tokens,
        summary_idxs=tuple(sorted(first_places)) if num_cls_tokens > 1 else (0,),
        table_side=math.isqrt(state[f"{GENERATOR}pos_embed"].shape[1]),
        final_norm=f"{BACKBONE}norm.weight" in state,
        layer_scale=f"{BACKBONE}blocks.0.ls1.gamma" in state,
        qkv_bias=f"{BACKBONE}blocks.0.attn.qkv.bias" in state,
        patch_bias=f"{GENERATOR}embedder.bias" in state,
    )


def _as_tuples(options: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(options) - {field.name for field in dataclasses.fields(PlainViTShape)})
    if unknown:
        raise ValueError(f"a plain ViT has no {', '.join(unknown)}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
