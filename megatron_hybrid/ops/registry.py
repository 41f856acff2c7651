"""Which implementations each operation has; callers choose one by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType

from megatron_hybrid.ops import activation, attention, attention_blocked, conv1d, cross_entropy, linear, mamba_core, norm, ssd, ssd_chunked


@dataclass(frozen=True)
class _TritonOperation:
    """A function in `megatron_hybrid.ops.triton` that is imported when chosen, because hosts without triton have the others."""

    module: str
    name: str

    def load(self) -> Callable:
        try:
            return getattr(import_module(f"megatron_hybrid.ops.triton.{self.module}"), self.name)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise ValueError(
                f"{self.name!r} in its 'triton' implementation needs the package triton, which is not installed here"
            ) from error


IMPLEMENTATIONS: Mapping[str, Mapping[str, Callable | _TritonOperation]] = MappingProxyType(
    {
        "ssd": {"reference": ssd.ssd_reference, "cpu": ssd_chunked.ssd_chunked, "triton": _TritonOperation("ssd", "ssd")},
        "causal_conv1d": {
            "reference": conv1d.causal_conv1d_reference,
            "cpu": conv1d.causal_conv1d,
            "triton": _TritonOperation("conv1d", "causal_conv1d"),
        },
        "rms_norm": {"reference": norm.rms_norm_reference, "cpu": norm.rms_norm, "triton": _TritonOperation("norm", "rms_norm")},
        "gated_rms_norm": {
            "reference": norm.gated_rms_norm_reference,
            "cpu": norm.gated_rms_norm,
            "triton": _TritonOperation("norm", "gated_rms_norm"),
        },
        "mamba_core": {
            "reference": mamba_core.mamba_core_reference,
            "cpu": mamba_core.mamba_core,
            "triton": _TritonOperation("mamba_core", "mamba_core"),
        },
        "squared_relu": {
            "reference": activation.squared_relu_reference,
            "cpu": activation.squared_relu,
            "triton": _TritonOperation("activation", "squared_relu"),
        },
        "linear": {"reference": linear.linear_reference, "cpu": linear.linear},
        "attention": {
            "reference": attention.attention_reference,
            "cpu": attention_blocked.attention_blocked,
            "sdpa": attention.attention_sdpa,
        },
        "cross_entropy": {"reference": cross_entropy.cross_entropy_reference, "cpu": cross_entropy.cross_entropy},
        "linear_cross_entropy": {
            "reference": cross_entropy.linear_cross_entropy_reference,
            "cpu": cross_entropy.linear_cross_entropy,
        },
    }
)


def select(operation: str, implementation: str) -> Callable:
    """The function computing `operation`; all implementations of one operation take the same required arguments and return the same.

    Raises ValueError naming what there is when either name is unknown, or when the implementation needs a package that is not installed.
    """
    if operation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown operation {operation!r}; there are: {', '.join(sorted(IMPLEMENTATIONS))}")
    implementations = IMPLEMENTATIONS[operation]
    if implementation not in implementations:
        raise ValueError(f"operation {operation!r} has no implementation {implementation!r}; it has: {', '.join(sorted(implementations))}")
    chosen = implementations[implementation]
    return chosen.load() if isinstance(chosen, _TritonOperation) else chosen
