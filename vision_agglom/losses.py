"""The terms of the distillation loss. Each returns one number per image, [B] fp32; callers weigh and sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_COSINE_SHARE, _SMOOTH_L1_SHARE = 0.9, 0.1
"""AM-RADIO, section 3: alpha and beta of the spatial loss."""


def summary_cosine(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """1 - cos (AM-RADIO)."""
    return 1 - F.cosine_similarity(student_BC.float(), teacher_BC.float(), dim=-1)


def summary_angle(student_BC: Tensor, teacher_BC: Tensor, dispersion: Tensor) -> Tensor:
    """Squared angle over the teacher's dispersion, the mean squared angle of its summaries to their mean (C-RADIOv4).

    A teacher whose summaries lie close together is not drowned by one whose summaries spread.
    """
    return angle(student_BC, teacher_BC).square() / dispersion


def angle(first_BC: Tensor, second_BC: Tensor) -> Tensor:
    """Angle between vectors in radians, [B] fp32, accurate and differentiable near 0 and pi: 2 atan2(|a - b|, |a + b|) of unit vectors."""
    first_BC, second_BC = (F.normalize(vectors.float(), dim=-1) for vectors in (first_BC, second_BC))
    return 2 * torch.atan2(_length(first_BC - second_BC), _length(first_BC + second_BC))


def spatial_mse(student_BTC: Tensor, target_BTC: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Squared error, mean over channels and over the positions that count."""
    # The subtraction widens a 16-bit side itself: no copy of it in fp32.
    return mean_over(mask_BT, (student_BTC - target_BTC.float()).square().mean(-1))


def spatial_cosine_smooth_l1(student_BTC: Tensor, target_BTC: Tensor, beta: float, mask_BT: Tensor | None = None) -> Tensor:
    """0.9 (1 - cos) + 0.1 smooth L1, mean over the positions that count (AM-RADIO, equation 3)."""
    student_BTC, target_BTC = student_BTC.float(), target_BTC.float()
    cosine_BT = 1 - F.cosine_similarity(student_BTC, target_BTC, dim=-1)
    magnitude_BT = F.smooth_l1_loss(student_BTC, target_BTC, beta=beta, reduction="none").mean(-1)
    return mean_over(mask_BT, _COSINE_SHARE * cosine_BT + _SMOOTH_L1_SHARE * magnitude_BT)


def mesa(student_BTC: Tensor, average_BTC: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Squared error between layer-normalised features (no affine) of the student and of its average past self (C-RADIOv4)."""
    channels = student_BTC.shape[-1:]
    return spatial_mse(F.layer_norm(student_BTC.float(), channels), F.layer_norm(average_BTC.float(), channels), mask_BT)


def mean_over(mask_BT: Tensor | None, values_BT: Tensor) -> Tensor:
    """Mean of each row over the positions that count; 0 where none does."""
    if mask_BT is None:
        return values_BT.mean(-1)
    return (values_BT * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)


def _length(vectors_BC: Tensor) -> Tensor:
    # The gradient of a plain norm at 0 is not a number.
    return (vectors_BC.square().sum(-1) + 1e-12).sqrt()
