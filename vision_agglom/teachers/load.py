"""From a teacher's configuration to a model that can be called."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.teachers.frozen import FrozenTeacher
from vision_agglom.teachers.tower import Tower


def load_teacher(spec: TeacherConfig, device: torch.device | str, dtype: torch.dtype) -> FrozenTeacher:
    """Build a teacher, with its weights or as an offline twin, and run it once on one image.

    Args:
        spec: which model, and how it is to be run.
        device: where it runs.
        dtype: torch.float32 or torch.bfloat16.

    Raises:
        ValueError: the library does not import here, the model or its weights are not there, or the options do not fit it.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"teacher {spec.name!r}: expected torch.float32 or torch.bfloat16, got {dtype}")
    return FrozenTeacher(_build_tower(spec), spec, device, dtype)


def _build_tower(spec: TeacherConfig) -> Tower:
    try:
        build: Callable[[TeacherConfig], Tower] = importlib.import_module(f"vision_agglom.teachers.{spec.library}_tower").build_tower
    except (ImportError, RuntimeError) as error:
        # timm and open_clip import torchvision, which raises RuntimeError where it does not fit torch.
        raise ValueError(f"teacher {spec.name!r}: library={spec.library} does not import here: {error}") from error
    try:
        return build(spec)
    except (OSError, RuntimeError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"teacher {spec.name!r}: {spec.library} cannot build {spec.model!r}: {error}") from error
