"""How far a student's hidden states are from its teacher's, token by token: what distillation between layers is made of.

Both are means or ratios over the whole width, so that they are of one size whatever the width: nvidia-modelopt's ``MSELoss`` and
``HiddenStateCosineLoss`` (``modelopt.torch.distill.plugins.megatron``, 0.43.0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch.nn.functional as F
from torch import Tensor


def mean_squared_error(student_LBD: Tensor, teacher_LBD: Tensor) -> Tensor:
    """Mean over the width of (student - teacher)^2, fp32 [L, B]; only the student gets a gradient."""
    return (student_LBD.float() - teacher_LBD.detach().float()).square().mean(-1)


def cosine_distance(student_LBD: Tensor, teacher_LBD: Tensor) -> Tensor:
    """1 - cosine of the angle between student and teacher, fp32 [L, B]: 0 where they point the same way, whatever their lengths."""
    return 1.0 - F.cosine_similarity(student_LBD.float(), teacher_LBD.detach().float(), dim=-1)


HIDDEN_STATE_LOSSES: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {"mse": mean_squared_error, "cosine": cosine_distance}
"""By the names that options give them."""
