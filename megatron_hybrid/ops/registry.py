"""Which implementations each operation has; callers choose one by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from megatron_hybrid.ops import (
    activation,
    attention,
    attention_blocked,
    conv1d,
    cross_entropy,
    distillation,
    linear,
    norm,
    ssd,
    ssd_chunked,
)

IMPLEMENTATIONS: Mapping[str, Mapping[str, Callable]] = MappingProxyType(
    {
        "ssd": {"reference": ssd.ssd_reference, "cpu": ssd_chunked.ssd_chunked},
        "causal_conv1d": {"reference": conv1d.causal_conv1d_reference, "cpu": conv1d.causal_conv1d},
        "rms_norm": {"reference": norm.rms_norm_reference, "cpu": norm.rms_norm},
        "gated_rms_norm": {"reference": norm.gated_rms_norm_reference, "cpu": norm.gated_rms_norm},
        "squared_relu": {"reference": activation.squared_relu_reference, "cpu": activation.squared_relu},
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
        "linear_kl_divergence": {
            "reference": distillation.linear_kl_divergence_reference,
            "cpu": distillation.linear_kl_divergence,
        },
    }
)


def select(operation: str, implementation: str) -> Callable:
    """The function computing `operation`; all implementations of one operation take the same required arguments and return the same.

    Raises ValueError naming what there is when either name is unknown.
    """
    if operation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown operation {operation!r}; there are: {', '.join(sorted(IMPLEMENTATIONS))}")
    implementations = IMPLEMENTATIONS[operation]
    if implementation not in implementations:
        raise ValueError(f"operation {operation!r} has no implementation {implementation!r}; it has: {', '.join(sorted(implementations))}")
    return implementations[implementation]
