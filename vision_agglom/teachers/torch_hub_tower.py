"""Teachers from torch.hub: DINOv2 and DINOv3 of facebookresearch, RADIO of NVlabs, or a folder with a hubconf.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.teachers.tower import IMAGENET, RGB, Described, Tower, build_seeded, side_of


def build_tower(spec: TeacherConfig) -> Tower:
    """Build ``torch.hub.load(REPO, ENTRY, **options)`` of a spec.model REPO:ENTRY; REPO may be a folder.

    ``pretrained`` is passed on to entries in DINO's style and left out for RADIO, which names its weights by the option ``version``.

    Raises:
        ValueError: the model gives neither DINO's nor RADIO's outputs.
        OSError, RuntimeError: torch.hub cannot get it.
    """
    repository, _, entry = spec.model.rpartition(":")
    options = dict(spec.options)
    if "version" not in options:
        options.setdefault("pretrained", spec.pretrained)
    source = "local" if Path(repository).is_dir() else "github"
    model = build_seeded(spec.seed, lambda: torch.hub.load(repository, entry, source=source, trust_repo=True, **options))
    describe, normalisation = _find_outputs(model)
    # DINO and RADIO say it themselves.
    patch_size = side_of(model.patch_size)
    return Tower(
        module=model,
        describe=describe,
        patch_size=patch_size,
        resolution=_find_resolution(model, patch_size),
        fixed_resolution=False,
        normalisation=normalisation,
    )


def _find_outputs(model: nn.Module) -> tuple[Callable[[Tensor], Described], tuple[RGB, RGB]]:
    """Return how to read the model, and the normalisation that it expects."""
    if hasattr(model, "input_conditioner"):

        def describe(pixels: Tensor) -> Described:
            output = model(pixels)
            summary, spatial = output if isinstance(output, tuple) else (output.summary, output.features)
            return summary, spatial

        conditioner = model.make_preprocessor_external()
        normalisation = tuple(conditioner.norm_mean.flatten().tolist()), tuple(conditioner.norm_std.flatten().tolist())
    elif hasattr(model, "forward_features"):

        def describe(pixels: Tensor) -> Described:
            features = model.forward_features(pixels)
            return features["x_norm_clstoken"], features["x_norm_patchtokens"]

        normalisation = IMAGENET
    else:
        raise ValueError("expected RADIO (input_conditioner) or a DINO (forward_features), got neither")
    return describe, normalisation


def _find_resolution(model: nn.Module, patch_size: int) -> int:
    """RADIO's preferred side where it names one; else 16 patches, which DINO models are usually run at."""
    preferred = getattr(model, "preferred_resolution", None)
    return side_of(tuple(preferred)) if preferred else 16 * patch_size
