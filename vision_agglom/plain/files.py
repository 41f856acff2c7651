"""Files of Vision Transformers, read into NVlabs' parameter names: RADIO's releases and our exports, timm's ViTs, DINOv2's own files.

A file is opened with weights_only: tensors, plain types and argparse.Namespace, nothing that runs.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BACKBONE = "base_model."
GENERATOR = "base_model.patch_generator."
FEATURE_NORMALIZER = "_feature_normalizer."
"""Beginning of the names of a last affine map of the patches, which some RADIO files have: behind the backbone, before its outputs."""

_BEHIND_THE_BACKBONE = (
    *("_heads.", "_feature_projections.", "_intermediate_feature_normalizer.", "summary_idxs"),
    *("head.", "head_dist.", "fc_norm.", "attn_pool.", "mask_token", "patch_generator.video_embedder."),
)
"""Beginnings of names, with or without BACKBONE."""


@dataclass(frozen=True)
class VitFile:
    """What a file holds."""

    state: dict[str, Tensor]
    """Backbone under BACKBONE; what is no part of it under the file's own names."""
    args: argparse.Namespace
    """As NVlabs' files have them, else empty."""
    is_timm: bool
    num_cls_tokens: int | None
    """How many of the tokens before the patches are class tokens, the first ones; None where the file does not say."""


def read_vit_file(path: str | Path) -> VitFile:
    """Read a .safetensors file, or one of torch.save, that holds a state dict or has one as state_dict_ema, state_dict or model.

    Raises:
        ValueError: it holds something else than tensors and plain types, or no such ViT.
        OSError: there is no such file.
    """
    state, args = _read_state(Path(path))
    if f"{GENERATOR}pos_embed" not in state:
        return VitFile(_rename_timm(state), args, is_timm=True, num_cls_tokens=int("cls_token" in state))
    return VitFile(state, args, is_timm=False, num_cls_tokens=_count_cls_tokens(args))


def is_behind_backbone(name: str) -> bool:
    """Whether a tensor of a file is no part of what a backbone makes of images: a head's, or there for training or other inputs."""
    return name.removeprefix(BACKBONE).startswith(_BEHIND_THE_BACKBONE)


def _count_cls_tokens(args: argparse.Namespace) -> int | None:
    teachers = getattr(args, "teachers", None)
    if not teachers:
        return None
    return len({teacher["name"] for teacher in teachers}) if getattr(args, "cls_token_per_teacher", True) else 1


def _read_state(path: Path) -> tuple[dict[str, Tensor], argparse.Namespace]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path), argparse.Namespace()
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch and safetensors raise pickle, zip and runtime errors of many kinds
        raise ValueError(f"not a checkpoint of tensors and plain types: {error}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"expected a dictionary, got {type(loaded).__name__}")
    args = loaded.get("args", argparse.Namespace())
    state = next((loaded[key] for key in ("state_dict_ema", "state_dict", "model") if loaded.get(key) is not None), loaded)
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError("expected a state dict, or a dictionary that holds one as state_dict")
    return dict(state), args


def _rename_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring a timm ViT into NVlabs' names: its tokens' own positions are added to the tokens, which changes nothing.

    Raises:
        ValueError: it is none.
    """
    if "patch_embed.proj.weight" not in state or "pos_embed" not in state:
        raise ValueError("expected parameters of NVlabs' RADIO (base_model.patch_generator...) or of a timm ViT (patch_embed.proj...)")
    rest = dict(state)
    prefix = [rest.pop(name)[0] for name in ("cls_token", "reg_token", "register_tokens") if name in rest]
    positions = rest.pop("pos_embed")
    num_prefix_positions = positions.shape[1] - math.isqrt(positions.shape[1]) ** 2
    tokens_SD = torch.cat(prefix) if prefix else positions.new_empty(0, positions.shape[2])
    if num_prefix_positions > len(tokens_SD):
        raise ValueError(f"expected positions of the patches, or of the {len(tokens_SD)} tokens before them too, got {positions.shape[1]}")
    tokens_SD[:num_prefix_positions] += positions[0, :num_prefix_positions]
    renamed = {
        f"{GENERATOR}embedder.weight": rest.pop("patch_embed.proj.weight").flatten(1),
        f"{GENERATOR}pos_embed": positions[:, num_prefix_positions:],
        f"{GENERATOR}cls_token.token": tokens_SD,
    }
    if "patch_embed.proj.bias" in rest:
        renamed[f"{GENERATOR}embedder.bias"] = rest.pop("patch_embed.proj.bias")
    for name, tensor in rest.items():
        renamed[BACKBONE + name if name.startswith(("blocks.", "norm.")) else name] = tensor
    return renamed
