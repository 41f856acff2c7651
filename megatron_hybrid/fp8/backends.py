"""What casts to float8 and multiplies float8 matrices, on hosts that have hardware for it and on those that have not.

A backend is a cast, an amax and a product. On GPUs the cast is a Triton kernel, and the product cuBLASLt's, called directly, or through
Transformer Engine, or through torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_hybrid.fp8.formats import Float8Format, quantize
from megatron_hybrid.fp8.scaling import new_scale
from megatron_hybrid.ops.installed import transformer_engine_obstacle
from megatron_hybrid.ops.linear import matmul_nt

_LEAST_CAPABILITY = (8, 9)
"""NVIDIA's first compute capability with float8 tensor cores."""

Prologue = Literal["none", "squared_relu", "squared_relu_backward"]
"""What is cast: x; max(x, 0)^2; or x * 2 max(other, 0), the gradient in front of a squared ReLU whose input was ``other``."""


class Cast(Protocol):
    """Casts what the prologue makes of ``x`` as ``formats.quantize`` does."""

    def __call__(
        self,
        x_MK: Tensor,
        scale: Tensor,
        to: Float8Format,
        *,
        amax: Tensor | None,
        prologue: Prologue,
        other_MK: Tensor | None,
        rows: bool,
        columns: bool,
        into: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the cast [M, K] and its transpose [K, M], where asked for, whose fast axis a product may rely on.

        Args:
            x_MK: bf16 or fp32.
            scale: fp32 scalar.
            to: the format.
            amax: fp32 scalar that becomes the maximum of itself and the magnitudes before scaling, of which NaN's is infinite; None records
                nothing.
            prologue: what is done to x first.
            other_MK: what the prologue needs beside x.
            rows: whether [M, K] is wanted.
            columns: whether [K, M] is wanted.
            into: write both into these instead of new tensors.
        """


class Product(Protocol):
    """Computes ``(a @ b.T) * inverse_a * inverse_b``."""

    def __call__(
        self,
        a_MK: Tensor,
        b_NK: Tensor,
        inverse_a: Tensor,
        inverse_b: Tensor,
        *,
        out_dtype: torch.dtype,
        fast: bool,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """Multiply.

        Args:
            a_MK: float8 of either format, contiguous along K.
            b_NK: the same.
            inverse_a: what a's values are multiplied by to get what they stand for, fp32 scalar.
            inverse_b: b's.
            out_dtype: fp32 or bf16.
            fast: let the GPU keep partial sums in less than fp32, as training does in forward and not in backward.
            add_to: fp32 [M, N] that the product is added to in place, and that is returned.
        """


@dataclass(frozen=True)
class Backend:
    """One way to cast and multiply."""

    cast: Cast
    amax: Callable[..., Tensor]
    """(x_MK, prologue=..., other_MK=...) -> largest magnitude of what would be cast, fp32 scalar; infinite where there is NaN."""
    scales: Callable[[Tensor, Float8Format], tuple[Tensor, Tensor]]
    """Amax -> the scale of current scaling, and its inverse."""
    product: Product


def apply_prologue(x: Tensor, prologue: Prologue, other: Tensor | None) -> Tensor:
    """The specification of a prologue, in fp32 unless there is nothing to do."""
    if prologue == "none":
        return x
    if prologue == "squared_relu":
        return x.float().relu().square()
    return x.float() * (2 * other.float().relu())


def cast_plain(
    x_MK: Tensor,
    scale: Tensor,
    to: Float8Format,
    *,
    amax: Tensor | None,
    prologue: Prologue,
    other_MK: Tensor | None,
    rows: bool,
    columns: bool,
    into: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The cast in torch operations; the transpose is a view."""
    x_MK = apply_prologue(x_MK, prologue, other_MK)
    if amax is not None:
        torch.maximum(amax, amax_plain(x_MK), out=amax)
    x_8 = quantize(x_MK, scale, to)
    if into is None:
        return x_8 if rows else None, x_8.t() if columns else None
    for target, source in zip(into, (x_8, x_8.t()), strict=True):
        target.copy_(source)
    return into


def amax_plain(x_MK: Tensor, *, prologue: Prologue = "none", other_MK: Tensor | None = None) -> Tensor:
    """Largest magnitude, fp32 scalar; infinite where there is NaN, so that maxima over tensors and ranks need no rule for NaN."""
    largest = torch.linalg.vector_norm(apply_prologue(x_MK, prologue, other_MK), float("inf")).float()
    return largest.nan_to_num_(nan=math.inf, posinf=math.inf)


def scales_plain(amax: Tensor, to: Float8Format) -> tuple[Tensor, Tensor]:
    """Scale of current scaling, and its inverse."""
    scale = new_scale(amax, torch.ones_like(amax), to.largest)
    return scale, scale.reciprocal()


def emulated_product(
    a_MK: Tensor,
    b_NK: Tensor,
    inverse_a: Tensor,
    inverse_b: Tensor,
    *,
    out_dtype: torch.dtype,
    fast: bool,
    add_to: Tensor | None = None,
) -> Tensor:
    """The specification, on any device: products of float8 numbers are exact in fp32, and sums are fp32 whether ``fast`` or not."""
    product = matmul_nt(a_MK.float(), b_NK.float()) * (inverse_a * inverse_b)
    return product.to(out_dtype) if add_to is None else add_to.add_(product)


def scaled_mm_product(
    a_MK: Tensor,
    b_NK: Tensor,
    inverse_a: Tensor,
    inverse_b: Tensor,
    *,
    out_dtype: torch.dtype,
    fast: bool,
    add_to: Tensor | None = None,
) -> Tensor:
    """torch's own product, which cannot add: a pass of its own does."""
    out_dtype = out_dtype if add_to is None else torch.float32
    product = torch._scaled_mm(a_MK, b_NK.t(), inverse_a, inverse_b, out_dtype=out_dtype, use_fast_accum=fast)
    return product if add_to is None else add_to.add_(product)


def cublaslt_product(
    a_MK: Tensor,
    b_NK: Tensor,
    inverse_a: Tensor,
    inverse_b: Tensor,
    *,
    out_dtype: torch.dtype,
    fast: bool,
    add_to: Tensor | None = None,
) -> Tensor:
    """cuBLASLt's own, which adds within the product."""
    from megatron_hybrid.ops.cublaslt import multiply

    scales = {"inverse_a": inverse_a, "inverse_b": inverse_b}
    return multiply(a_MK, b_NK, out=add_to, accumulate=add_to is not None, out_dtype=out_dtype, fast=fast, **scales)


def _emulated() -> Backend:
    return Backend(cast_plain, amax_plain, scales_plain, emulated_product)


def _scaled_mm() -> Backend:
    from megatron_hybrid.fp8 import kernels

    return Backend(kernels.cast, kernels.amax, kernels.scales, scaled_mm_product)


def _cublaslt() -> Backend:
    from megatron_hybrid.fp8 import kernels

    return Backend(kernels.cast, kernels.amax, kernels.scales, cublaslt_product)


def _transformer_engine() -> Backend:
    from megatron_hybrid.fp8 import kernels
    from megatron_hybrid.fp8.transformer_engine import transformer_engine_product

    return Backend(kernels.cast, kernels.amax, kernels.scales, transformer_engine_product)


IMPLEMENTATIONS: Mapping[str, Callable[[], Backend]] = MappingProxyType(
    {"emulated": _emulated, "scaled_mm": _scaled_mm, "cublaslt": _cublaslt, "transformer_engine": _transformer_engine}
)
"""Name -> what makes the backend; a package it needs is imported only then."""


@cache
def make_backend(implementation: str) -> Backend:
    """The backend of a name that ``choose_implementation`` returned."""
    return IMPLEMENTATIONS[implementation]()


def choose_implementation(implementation: str, device: torch.device) -> str:
    """Return the name of the backend that a device uses.

    Args:
        implementation: a name in ``IMPLEMENTATIONS``, or "auto": the emulation on a CPU, cuBLASLt on an NVIDIA GPU.

    Raises:
        ValueError: nothing implements float8 on the device, or the implementation asked for does not run there.
    """
    if implementation == "auto":
        implementation = "emulated" if device.type == "cpu" else "cublaslt"
    if implementation == "transformer_engine" and (obstacle := transformer_engine_obstacle()):
        raise ValueError(f"fp8.implementation=transformer_engine {obstacle}, or set fp8.implementation=auto")
    if implementation != "emulated":
        _require_float8_cores(implementation, device)
    return implementation


def _require_float8_cores(implementation: str, device: torch.device) -> None:
    if device.type == "cpu":
        raise ValueError(f"fp8.implementation={implementation} needs a GPU, this run is on a CPU; set it to auto or emulated")
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None or capability < _LEAST_CAPABILITY:
        name, own, least = torch.cuda.get_device_name(device), *(".".join(map(str, each)) for each in (capability, _LEAST_CAPABILITY))
        raise ValueError(
            f"{name} (compute capability {own}) has no float8 products, which NVIDIA GPUs have from {least} on; "
            "set 'fp8={recipe: off}', or fp8.implementation=emulated to have the numbers without the speed"
        )
