"""From the host to the device without waiting for what the device is still doing."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device`` of a tensor on the host. Plain ``.to`` would wait until the device has done all before it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
