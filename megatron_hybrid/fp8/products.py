"""The matrix product of two float8 matrices, on hosts that have one and on those that have not."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from megatron_hybrid.ops.linear import matmul_nt

_LEAST_CAPABILITY = (8, 9)
"""NVIDIA's first compute capability with float8 tensor cores."""


class Product(Protocol):
    """Computes ``(a @ b.T) * inverse_a * inverse_b``."""

    def __call__(self, a_MK: Tensor, b_NK: Tensor, inverse_a: Tensor, inverse_b: Tensor, *, out_dtype: torch.dtype, fast: bool) -> Tensor:
        """Multiply.

        Args:
            a_MK: float8 of either format, any strides.
            b_NK: the same.
            inverse_a: what a's values are multiplied by to get what they stand for, fp32 scalar.
            inverse_b: b's.
            out_dtype: fp32 or bf16.
            fast: let the GPU keep partial sums in less than fp32, as training does in forward and not in backward.
        """


def emulated_product(a_MK: Tensor, b_NK: Tensor, inverse_a: Tensor, inverse_b: Tensor, *, out_dtype: torch.dtype, fast: bool) -> Tensor:
    """The specification, on any device: products of float8 numbers are exact in fp32, and sums are fp32 whether ``fast`` or not."""
    return (matmul_nt(a_MK.float(), b_NK.float()) * (inverse_a * inverse_b)).to(out_dtype)


def scaled_mm_product(a_MK: Tensor, b_NK: Tensor, inverse_a: Tensor, inverse_b: Tensor, *, out_dtype: torch.dtype, fast: bool) -> Tensor:
    """torch's own product. The tensor cores read both operands along K, so either is copied where its K does not run fastest."""
    return torch._scaled_mm(a_MK.contiguous(), b_NK.contiguous().t(), inverse_a, inverse_b, out_dtype=out_dtype, use_fast_accum=fast)


IMPLEMENTATIONS: Mapping[str, Product] = MappingProxyType({"emulated": emulated_product, "scaled_mm": scaled_mm_product})


def choose_implementation(implementation: str, device: torch.device) -> str:
    """Return the name of the product that a device uses.

    Args:
        implementation: a name in ``IMPLEMENTATIONS``, or "auto": the emulation on a CPU, torch's product on a GPU.

    Raises:
        ValueError: nothing implements float8 on the device, or the implementation asked for does not run there.
    """
    if implementation == "auto":
        implementation = "emulated" if device.type == "cpu" else "scaled_mm"
    if implementation == "scaled_mm":
        _require_float8_cores(device)
    return implementation


def _require_float8_cores(device: torch.device) -> None:
    if device.type == "cpu":
        raise ValueError("fp8.implementation=scaled_mm needs a GPU, this run is on a CPU; set it to auto or emulated")
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None or capability < _LEAST_CAPABILITY:
        name, own, least = torch.cuda.get_device_name(device), *(".".join(map(str, each)) for each in (capability, _LEAST_CAPABILITY))
        raise ValueError(
            f"{name} (compute capability {own}) has no float8 products, which NVIDIA GPUs have from {least} on; "
            "set fp8.recipe=off, or fp8.implementation=emulated to have the numbers without the speed"
        )
